// Reads the data, makes the controls, and draws what is chosen.

const data = JSON.parse(document.getElementById("data").textContent);
const methods = [...new Set(data.arms.map((arm) => arm.method))];

for (const arm of data.arms) {
  const kind = methods.indexOf(arm.method), siblings = data.arms.filter((other) => other.method === arm.method);
  arm.style = {
    colour: COLOURS[kind % COLOURS.length],
    shape: SHAPES[kind % SHAPES.length],
    dash: DASHES[(siblings.indexOf(arm) + kind) % DASHES.length],
  };
}

const hidden = new Set();
const PLOTS = { flops: flopsPlot, budget: budgetPlot, agreement: agreementPlot, layers: layersPlot, time: timePlot, memory: memoryPlot, grid: gridPlot };

function draw() {
  document.getElementById("tip").hidden = true;
  const arms = data.arms.filter((arm) => arm.examples && !hidden.has(arm.name));
  for (const [id, plot] of Object.entries(PLOTS)) {
    const figure = document.getElementById(id);
    const drawn = arms.length ? plot(arms) : null;
    for (const old of [...figure.children].slice(1)) old.remove();
    // A plot that no choice of arms can fill is not there at all.
    figure.hidden = drawn === null && !data.arms.some((arm) => hidden.has(arm.name));
    figure.append(drawn ?? html("p", { class: "note" }, "Nothing to draw for the arms shown."));
  }
  for (const element of document.querySelectorAll("[data-arm]")) element.hidden = hidden.has(element.dataset.arm);
}

const controls = document.getElementById("arms");
for (const arm of data.arms) {
  const box = html("input", { type: "checkbox" });
  box.checked = true;
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(arm.name);
    else hidden.add(arm.name);
    draw();
  });
  controls.append(html("label", {}, box, sample(arm.style), arm.name));
}

addEventListener("beforeprint", () => { for (const element of document.querySelectorAll("details")) element.open = true; });
draw();
