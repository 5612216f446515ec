// The plots. Each takes the arms that are shown, with their styles, and returns an element, or null if there is nothing to draw.

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const ms = (seconds) => `${(1000 * seconds).toPrecision(3)} ms`;
const mib = (bytes) => `${(bytes / 2 ** 20).toFixed(2)} MiB`;
const armLegend = (arms) => legend(arms.map((arm) => [dot(arm.style), arm.name]));

function describeArm(arm) {
  return `${arm.name}\naccuracy ${percent(arm.accuracy)} (${percent(arm.interval[0])} to ${percent(arm.interval[1])})\n` +
    `${percent(arm.relative_flops)} of the FLOPs, ${percent(arm.relative_tokens)} of the tokens` +
    (arm.mark ? `\nagainst the baseline: ${(100 * arm.difference).toFixed(1)} points, ${arm.mark}` : "");
}

function point(plot, arm, px, words, value = arm.accuracy, interval = arm.interval) {
  const colour = arm.style.colour;
  plot.root.append(errorBar(px, plot.y(interval[0]), plot.y(interval[1]), colour));
  plot.root.append(tip(svg("g", {}, marker(arm.style.shape, px, plot.y(value), colour)), words));
}

// Accuracy against a cost, with the Pareto front of the arms that are drawn. cost: of an arm, null where it is not known.
function costPlot(arms, label, axis, cost, most = null) {
  const own = arms.filter((arm) => cost(arm) != null);
  if (!own.length) return null;
  const plot = frame(label, 0, most ?? 1.05 * Math.max(...own.map(cost), 1e-9), 0, 1, axis, "accuracy");
  const front = own.filter((a) => !own.some((b) => cost(b) <= cost(a) && b.accuracy >= a.accuracy && (cost(b) < cost(a) || b.accuracy > a.accuracy)));
  front.sort((a, b) => cost(a) - cost(b));
  plot.root.append(line(front.map((arm) => [plot.x(cost(arm)), plot.y(arm.accuracy)]), "#8b949e", "5 4", 1.5));
  for (const arm of own) {
    point(plot, arm, plot.x(cost(arm)), `${describeArm(arm)}\n${brief(cost(arm))}: ${axis}` + (front.includes(arm) ? "\non the Pareto front" : ""));
  }
  const dashes = svg("svg", { viewBox: "0 0 34 14", "aria-hidden": "true" }, line([[1, 7], [33, 7]], "#8b949e", "5 4", 1.5));
  return html("div", {}, plot.root, legend([...own.map((arm) => [dot(arm.style), arm.name]), [dashes, "Pareto front"]]));
}

const flopsPlot = (arms) => costPlot(arms, "Accuracy against relative FLOPs", "FLOPs of the prefill, share of dense", (arm) => arm.relative_flops, 1.05);
const speedPlot = (arms) => costPlot(arms, "Accuracy against time", "prefill with vision, milliseconds", (arm) => 1000 * (arm.seconds.prefill + arm.seconds.vision));
const spacePlot = (arms) => costPlot(arms, "Accuracy against memory", arms.some((arm) => arm.growth_bytes != null) ? "growth at the peak, MiB" : "KV cache, MiB",
  (arm) => (arm.growth_bytes ?? arm.kv_bytes) / 2 ** 20);

function agreementPlot(arms) {
  const own = arms.filter((arm) => arm.agreement != null);
  if (!own.length) return null;
  const plot = frame("Agreement with dense against relative FLOPs", 0, 1.05, 0, 1, "FLOPs of the prefill, share of dense", "same first token as dense");
  for (const arm of own) {
    const words = `${arm.name}\nsame first token: ${percent(arm.agreement)}\nKL from dense: ${arm.kl == null ? "none" : arm.kl.toPrecision(3) + " nats"}`;
    point(plot, arm, plot.x(arm.relative_flops), words, arm.agreement, arm.agreement_interval);
  }
  return html("div", {}, plot.root, armLegend(own));
}

function budgetPlot(arms) {
  const own = arms.filter((arm) => arm.share != null && arm.share < 1);
  if (!own.length) return null;
  const plot = frame("Accuracy against the token budget", 0, 1.05, 0, 1, "budget: share of the tokens that remains", "accuracy");
  for (const dense of arms.filter((arm) => arm.method === "dense")) {
    plot.root.append(line([[plot.x(0), plot.y(dense.accuracy)], [plot.x(1.05), plot.y(dense.accuracy)]], dense.style.colour, "1 4", 1.5));
    point(plot, dense, plot.x(1), describeArm(dense));
  }
  for (const group of groups(own)) {
    plot.root.append(line(group.map((arm) => [plot.x(arm.share), plot.y(arm.accuracy)]), group[0].style.colour));
    // Side by side, so that intervals at one budget do not cover each other.
    for (const arm of group) point(plot, arm, plot.x(arm.share) + 5 * (own.filter((other) => other.share === arm.share).indexOf(arm) -
      (own.filter((other) => other.share === arm.share).length - 1) / 2), describeArm(arm));
  }
  return html("div", {}, plot.root, legend(arms.filter((arm) => own.includes(arm) || arm.method === "dense").map((arm) => [sample({ ...arm.style, dash: arm.method === "dense" ? "1 4" : "" }), arm.name])));
}

// Arms of one method and model, by growing budget.
function groups(arms) {
  const found = new Map();
  for (const arm of arms) {
    const key = JSON.stringify([arm.method, arm.model]);
    found.set(key, [...(found.get(key) ?? []), arm]);
  }
  return [...found.values()].map((group) => group.sort((a, b) => a.share - b.share));
}

function layersPlot(arms) {
  const most = Math.max(...arms.map((arm) => Math.max(...arm.tokens_per_layer)));
  const depth = Math.max(...arms.map((arm) => arm.tokens_per_layer.length));
  const plot = frame("Tokens that each layer holds", 0, depth, 0, most * 1.05, "layer", "tokens", true);
  for (const arm of arms) {
    const steps = arm.tokens_per_layer.flatMap((count, layer) => [[plot.x(layer), plot.y(count)], [plot.x(layer + 1), plot.y(count)]]);
    plot.root.append(line(steps, arm.style.colour, arm.style.dash, 2.2));
  }
  for (let layer = 0; layer < depth; layer++) {
    const words = [`layer ${layer}`, ...arms.map((arm) => `${arm.name}: ${brief(arm.tokens_per_layer[layer] ?? 0)}`)].join("\n");
    plot.root.append(tip(svg("rect", { x: plot.x(layer), y: TOP, width: plot.x(1) - plot.x(0), height: HEIGHT - TOP - BOTTOM, fill: "transparent" }), words));
  }
  return html("div", {}, plot.root, legend(arms.map((arm) => [stroke(arm.style), `${arm.name}: mean ${brief(mean(arm.tokens_per_layer))}`])));
}

// Horizontal bars: rows of {name, parts: [[value, colour, words]], total}.
function bars(label, rows, unit) {
  const room = Math.min(260, 14 + 8 * Math.max(...rows.map((row) => row.name.length)));
  const height = 26 * rows.length + 40, most = Math.max(...rows.map((row) => row.parts.reduce((sum, part) => sum + part[0], 0)), 1e-9);
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "group", "aria-label": label });
  const x = scale(0, most * 1.16, room, WIDTH - RIGHT);
  for (const value of ticks(0, most)) {
    root.append(svg("line", { x1: x(value), x2: x(value), y1: 4, y2: height - 34, class: "axis" }), text(x(value), height - 20, brief(value), { "text-anchor": "middle" }));
  }
  root.append(text((room + WIDTH - RIGHT) / 2, height - 4, unit, { "text-anchor": "middle" }));
  rows.forEach((row, number) => {
    const y = 26 * number + 6;
    let at = 0;
    root.append(text(room - 8, y + 14, row.name, { "text-anchor": "end", class: "label" }));
    for (const [value, colour, words] of row.parts) {
      if (value > 0) root.append(tip(svg("rect", { x: x(at), y, width: Math.max(x(at + value) - x(at), 0.6), height: 19, fill: colour, stroke: "var(--halo)", "stroke-width": 0.5 }), words));
      at += value;
    }
    root.append(text(x(at) + 5, y + 14, row.total));
  });
  return root;
}

const PARTS = [["vision", "#56b4e9", "vision and the rest before the decoder"], ["prefill", "#0072b2", "prefill without selector"],
  ["selector", "#d55e00", "selector"], ["turns", "#cc79a7", "later turns"], ["decode", "#999999", "decoding"]];

function timePlot(arms) {
  const rows = arms.map((arm) => {
    const s = arm.seconds;
    const spent = { ...s, prefill: Math.max(s.prefill - s.selector, 0), decode: (s.decode_per_token ?? 0) * Math.max(arm.new_tokens - 1, 0) };
    const total = PARTS.reduce((sum, [name]) => sum + spent[name], 0);
    return { name: arm.name, total: `${brief(+(1000 * total).toPrecision(3))}`, parts: PARTS.map(([name, colour, words]) => [1000 * spent[name], colour, `${arm.name}\n${words}: ${ms(spent[name])}`]) };
  });
  const used = PARTS.filter((_, number) => rows.some((row) => row.parts[number][0] > 0));
  return html("div", {}, bars("Milliseconds per example", rows, "milliseconds, medians"), legend(used.map(([, colour, words]) => [swatch(colour), words])));
}

function memoryPlot(arms) {
  const rows = arms.flatMap((arm) => {
    const kv = [arm.kv_bytes / 2 ** 20, "#009e73", `${arm.name}\nKV cache: ${mib(arm.kv_bytes)}`];
    const found = [{ name: arm.name, total: kv[0].toFixed(2), parts: [kv] }];
    if (arm.growth_bytes != null) {
      const grown = arm.growth_bytes / 2 ** 20;
      found.push({ name: "", total: grown.toFixed(1), parts: [[grown, "#b8c4ce", `${arm.name}\ngrowth at the peak: ${mib(arm.growth_bytes)}\npeak: ${mib(arm.peak_bytes)}`]] });
    }
    return found;
  });
  const names = [[swatch("#009e73"), "KV cache after the prefill"], [swatch("#b8c4ce"), "growth of the process at its peak"]];
  return html("div", {}, bars("Mebibytes", rows, "MiB"), legend(arms.some((arm) => arm.growth_bytes != null) ? names : names.slice(0, 1)));
}

function gridPlot(arms) {
  const shown = arms.filter((arm) => arm.grid.length);
  if (!shown.length) return null;
  return html("div", {}, html("div", { class: "tiles" }, ...shown.map(gridTile)),
    html("p", { class: "note" }, "Columns: place of the needle, 0 first frame, 1 last. Rows: frames. Cells: per cent right."));
}

function gridTile(arm) {
  const places = [...new Map(arm.grid.map((cell) => [cell.position, cell.label]))].sort((a, b) => a[0] - b[0]);
  const lengths = [...new Set(arm.grid.map((cell) => cell.frames))].sort((a, b) => a - b);
  const side = 54, tall = 34, left = 34, width = left + side * places.length + 4, height = tall * lengths.length + 46;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `${arm.name}: accuracy by frames and needle position` });
  root.append(text(0, 14, arm.name, { class: "label" }));
  for (const cell of arm.grid) {
    const column = places.findIndex(([place]) => place === cell.position), row = lengths.indexOf(cell.frames), share = cell.right / cell.examples;
    const x = left + side * column, y = 24 + tall * row, shade = (end) => Math.round(247 + (end - 247) * share);
    const box = svg("g", {}, svg("rect", { x, y, width: side - 2, height: tall - 2, fill: `rgb(${shade(8)},${shade(69)},${shade(130)})`, stroke: "#d5dae0" }),
      svg("text", { x: x + side / 2 - 1, y: y + tall / 2 + 4, "text-anchor": "middle", fill: share > 0.5 ? "#fff" : "#1b1f24" }, (100 * share).toFixed(0)));
    root.append(tip(box, `${arm.name}\n${cell.frames} frames, needle at ${cell.label}\n${cell.right} of ${cell.examples} right`));
  }
  lengths.forEach((frames, row) => root.append(text(left - 6, 24 + tall * row + tall / 2 + 4, String(frames), { "text-anchor": "end" })));
  places.forEach(([, label], column) => root.append(text(left + side * column + side / 2 - 1, height - 6, label, { "text-anchor": "middle" })));
  return html("div", {}, root);
}
