// Drawing: SVG elements, axes, marks and the tip. All text goes in as text, never as markup.

const COLOURS = ["var(--mark)", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a7a00"]; // after Okabe and Ito
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const SHAPES = ["circle", "square", "triangle", "diamond", "cross"];
const WIDTH = 560, HEIGHT = 330, LEFT = 52, RIGHT = 16, TOP = 12, BOTTOM = 44;

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === "" || value == null) continue;
    // A variable of the style sheet is understood in a style only.
    if (String(value).startsWith("var(")) element.style.setProperty(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function html(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const text = (x, y, words, attributes = {}) => svg("text", { x, y, class: "tick", ...attributes }, words);

// Five or so round values from low to high.
function ticks(low, high, whole = false) {
  const rough = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999 && (!whole || s % 1 === 0)) ?? 1;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(+(k * step).toPrecision(12));
  return found;
}

const scale = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);
const brief = (value) => Math.abs(value) >= 1000 ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : String(+value.toPrecision(4));
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// A frame with axes: {root, x, y}, where x and y place values. whole: x counts things.
function frame(label, x0, x1, y0, y1, xName, yName, whole = false) {
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": label });
  const x = scale(x0, x1, LEFT, WIDTH - RIGHT), y = scale(y0, y1, HEIGHT - BOTTOM, TOP);
  for (const value of ticks(y0, y1)) {
    root.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "axis" }));
    root.append(text(LEFT - 7, y(value) + 4, brief(value), { "text-anchor": "end" }));
  }
  for (const value of ticks(x0, x1, whole)) root.append(text(x(value), HEIGHT - BOTTOM + 18, brief(value), { "text-anchor": "middle" }));
  root.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, xName, { "text-anchor": "middle" }));
  root.append(text(14, (TOP + HEIGHT - BOTTOM) / 2, yName, { "text-anchor": "middle", transform: `rotate(-90 14 ${(TOP + HEIGHT - BOTTOM) / 2})` }));
  return { root, x, y };
}

function marker(shape, x, y, colour, size = 5.5) {
  const s = size, filled = { fill: colour, stroke: "var(--halo)", "stroke-width": 1 };
  if (shape === "circle") return svg("circle", { cx: x, cy: y, r: s, ...filled });
  if (shape === "square") return svg("rect", { x: x - s, y: y - s, width: 2 * s, height: 2 * s, ...filled });
  if (shape === "triangle") return svg("path", { d: `M${x} ${y - s * 1.25}L${x + s * 1.2} ${y + s}H${x - s * 1.2}Z`, ...filled });
  if (shape === "diamond") return svg("path", { d: `M${x} ${y - s * 1.4}L${x + s * 1.4} ${y}L${x} ${y + s * 1.4}L${x - s * 1.4} ${y}Z`, ...filled });
  return svg("path", { d: `M${x - s} ${y - s}L${x + s} ${y + s}M${x + s} ${y - s}L${x - s} ${y + s}`, stroke: colour, "stroke-width": 3 });
}

function line(points, colour, dash = "", width = 2) {
  return svg("polyline", { points: points.map((p) => p.join(",")).join(" "), fill: "none", stroke: colour, "stroke-width": width, "stroke-dasharray": dash });
}

function errorBar(x, low, high, colour) {
  return svg("path", { d: `M${x} ${low}V${high}M${x - 3} ${low}h6M${x - 3} ${high}h6`, stroke: colour, "stroke-width": 1.2, fill: "none", opacity: 0.75 });
}

// Show words beside whatever is pointed at or has the focus.
function tip(element, words) {
  const box = document.getElementById("tip");
  const show = (x, y) => {
    box.textContent = words;
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    box.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - width - 8))}px`;
    box.style.top = `${y + 14 + height > innerHeight ? y - height - 10 : y + 14}px`;
  };
  element.classList.add("hit");
  element.setAttribute("tabindex", "0");
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", words.replaceAll("\n", ", "));
  element.addEventListener("pointermove", (event) => show(event.clientX, event.clientY));
  element.addEventListener("pointerleave", () => { box.hidden = true; });
  element.addEventListener("focus", () => { const r = element.getBoundingClientRect(); show(r.right, r.bottom); });
  element.addEventListener("blur", () => { box.hidden = true; });
  return element;
}

// Samples for legends, each of what the plot draws of an arm: its marker, its line, or both.
function dot(style) {
  return svg("svg", { viewBox: "0 0 34 14", "aria-hidden": "true" }, marker(style.shape, 17, 7, style.colour, 4));
}

function stroke(style) {
  return svg("svg", { viewBox: "0 0 34 14", "aria-hidden": "true" }, line([[1, 7], [33, 7]], style.colour, style.dash));
}

function sample(style) {
  const root = svg("svg", { viewBox: "0 0 34 14", "aria-hidden": "true" });
  root.append(line([[1, 7], [33, 7]], style.colour, style.dash), marker(style.shape, 17, 7, style.colour, 4));
  return root;
}

function swatch(colour) {
  return svg("svg", { viewBox: "0 0 34 14", "aria-hidden": "true" }, svg("rect", { x: 4, y: 1, width: 26, height: 12, fill: colour }));
}

function legend(entries) {
  return html("div", { class: "legend" }, ...entries.map(([mark, name]) => html("span", {}, mark, name)));
}
