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
const PLOTS = { flops: flopsPlot, speed: speedPlot, space: spacePlot, budget: budgetPlot, agreement: agreementPlot, layers: layersPlot, time: timePlot, memory: memoryPlot, grid: gridPlot };

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

// Where there is little room the chooser begins folded.
document.getElementById("chooser").open = innerWidth > 700 && data.arms.length <= 16;

// Tables: a click on a head sorts by it, numbers as numbers; a button hands the table out as CSV.
const weight = (cell) => { const found = cell.textContent.replaceAll("−", "-").replaceAll(",", "").match(/-?[0-9.]+(e-?[0-9]+)?/); return found ? +found[0] : null; };

function sort(table, column, head) {
  const body = table.tBodies[0], up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (row) => { const cell = row.cells[column]; return column ? weight(cell) : cell.textContent; };
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null);  // What has no number stays at the end.
    const order = typeof x === "string" ? x.localeCompare(y) : x - y;
    return up ? order : -order;
  });
  body.append(...rows);
}

const quoted = (words) => `"${words.replaceAll('"', '""')}"`;

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = html("button", { type: "button" }, head.textContent);
    button.addEventListener("click", () => sort(table, column, head));
    head.replaceChildren(button);
  });
  const save = html("button", { type: "button", class: "csv" }, "CSV");
  save.setAttribute("aria-label", `${table.parentElement.getAttribute("aria-label")} as CSV`);
  save.addEventListener("click", () => {
    const lines = [...table.rows].filter((row) => !row.hidden).map((row) => [...row.cells].map((cell) => quoted(cell.textContent)).join(","));
    const link = html("a", { href: URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" })), download: "table.csv" });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  table.parentElement.after(save);
}

addEventListener("beforeprint", () => { for (const element of document.querySelectorAll("details")) element.open = true; });
draw();
