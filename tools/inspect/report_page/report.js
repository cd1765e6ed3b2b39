"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
};
const units = (value, names, base) => { let i = 0; while (value >= base && i < names.length - 1) { value /= base; i++; } return `${+value.toPrecision(4)} ${names[i]}`; };
const flops = (n) => units(n, ["", "k", "M", "G", "T", "P"], 1000).trim();
const bytes = (n) => units(n, ["B", "kB", "MB", "GB", "TB"], 1000);
const percent = (part, whole) => (whole ? (100 * part / whole).toFixed(1) : "100.0") + " %";
const short = (x) => (x == null ? "–" : Math.abs(x) >= 1e5 || (x && Math.abs(x) < 1e-3) ? x.toExponential(2) : String(+x.toPrecision(4)));
const [NAME, OP, MODULE, BLOCK, PHASE, FLOPS, SHAPE, INPUTS, GRADIENT] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
const INPUT = 0, FORWARD = 1, BACKWARD = 2;

// Which parameters' gradients need each node: a bit per parameter, filled from the gradients back.
const N = D.nodes.length, P = D.parameters.length, W = Math.ceil(P / 32) || 1;
const masks = new Uint32Array(N * W), readers = D.nodes.map(() => []);
for (let i = N - 1; i >= 0; i--) {
  const gradient = D.nodes[i][GRADIENT];
  if (gradient >= 0) masks[i * W + (gradient >> 5)] |= 1 << (gradient & 31);
  for (const j of D.nodes[i][INPUTS]) {
    readers[j].push(i);
    for (let w = 0; w < W; w++) masks[j * W + w] |= masks[i * W + w];
  }
}
const working = D.nodes.flatMap((node, i) => (node[FLOPS] && node[PHASE] === BACKWARD ? [i] : []));
const maskOf = (parameters) => { const mask = new Uint32Array(W); for (const p of parameters) mask[p >> 5] |= 1 << (p & 31); return mask; };
const meets = (i, mask) => { for (let w = 0; w < W; w++) if (masks[i * W + w] & mask[w]) return true; return false; };
const stepFlops = (mask) => working.reduce((sum, i) => sum + (meets(i, mask) ? D.nodes[i][FLOPS] : 0), D.totals.forward_flops);
const parametersOf = (i) => D.parameters.flatMap((_, p) => (masks[i * W + (p >> 5)] & (1 << (p & 31)) ? [p] : []));
const fqn = (p) => D.parameters[p][0];
const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

let plan = D.plans[D.plans.length - 1], trained = new Set(plan.trained), mask = maskOf(plan.trained), chosen = -1;
const runs = (i) => D.nodes[i][PHASE] !== BACKWARD || meets(i, mask);
const status = (p) => (trained.has(p) ? "trained" : D.parameters[p][5] === "trained" ? "frozen" : D.parameters[p][5]);

function overview() {
  const t = D.totals, full = t.full_flops, settled = D.parameters.filter((p) => p[5] === "trained" || p[5] === "frozen").length;
  const cards = [
    ["full step", flops(full), "FLOPs, 2 per multiply-add"], ["this plan", percent(plan.step_flops, full), `${flops(plan.step_flops)} FLOPs; budget ${percent(plan.budget_flops, full)}`],
    ["trained", `${trained.size} of ${settled}`, "selectable parameters"], ["smallest budget", percent(t.minimum_budget_fraction, 1), "that trains anything"],
    ["saved for backward", bytes(plan.saved), `${plan.saved_measured == null ? "" : `${bytes(plan.saved_measured)} measured; `}${bytes(t.full_saved_bytes)} when all is trained`],
    ["importance bound", short(plan.bound), "no set within the budget has more"], ["graph", `${N} nodes`, `${D.nodes.filter((_, i) => !runs(i)).length} eliminated`],
    ["importance", D.run ? "measured" : "assumed", D.origin],
  ];
  $("cards").replaceChildren(...cards.map(([name, value, note]) => el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, note)))));
  let dw = 0; for (const p of trained) dw += D.parameters[p][4];
  const parts = [["forward", "fw", t.forward_flops], ["activation gradients", "dx", plan.step_flops - t.forward_flops - dw], ["weight gradients", "dw", dw], ["eliminated", "off", full - plan.step_flops]];
  $("shares").replaceChildren(
    el("div", { class: "bar", role: "img", "aria-label": parts.map(([name, , n]) => `${name} ${percent(n, full)}`).join(", ") }, ...parts.map(([, kind, n]) => el("i", { class: kind, style: `width:${full ? 100 * n / full : 0}%` }))),
    el("div", { class: "legend" }, ...parts.map(([name, kind, n]) => el("span", {}, el("i", { class: kind }), `${name} ${percent(n, full)}`))));
}

// Squarified treemap: rows along the shorter side, closed when another tile would make the worst one longer.
function squarify(items, x, y, w, h, out) {
  let total = items.reduce((sum, item) => sum + item.value, 0), start = 0;
  while (start < items.length && total > 0) {
    const side = Math.min(w, h), scale = (w * h) / total;
    let end = start, row = 0, worst = Infinity;
    while (end < items.length) {
      const sum = row + items[end].value * scale, longest = items[start].value * scale, least = items[end].value * scale;
      const ratio = Math.max((side * side * longest) / (sum * sum), (sum * sum) / (side * side * least));
      if (ratio > worst) break;
      worst = ratio; row = sum; end++;
    }
    let at = 0; const depth = row / side;
    for (const item of items.slice(start, end)) {
      const length = (item.value * scale) / depth;
      out.push(w < h ? { item, x: x + at, y, w: length, h: depth } : { item, x, y: y + at, w: depth, h: length });
      at += length; total -= item.value;
    }
    if (w < h) { y += depth; h -= depth; } else { x += depth; w -= depth; }
    start = end;
  }
}
let inside = -1;
function treemap() {
  const field = +$("area").value, groups = new Map();
  D.parameters.forEach((p, i) => {
    if (inside >= 0 && p[6] !== inside) return;
    const key = inside >= 0 ? i : p[6], group = groups.get(key) || { key, value: 0, trained: 0, name: inside >= 0 ? p[0] : D.blocks[p[6]] };
    group.value += p[field]; group.trained += trained.has(i) ? p[field] : 0; groups.set(key, group);
  });
  const items = [...groups.values()].filter((g) => g.value > 0).sort((a, b) => b.value - a.value), tiles = [];
  squarify(items, 0, 0, $("treemap").clientWidth || 800, $("treemap").clientHeight || 380, tiles);
  const end = (name, segments) => name.split(".").slice(-segments).join(".");
  let segments = 2; // as many as tell the blocks apart: encoder.block.0 is not decoder.block.0
  while (segments < 9 && new Set(items.map((item) => end(item.name, segments))).size < items.length) segments++;
  const last = (name) => (inside >= 0 ? name.slice(D.blocks[inside].length + 1) || name : end(name, segments));
  $("treemap").replaceChildren(...tiles.map(({ item, x, y, w, h }) => {
    const share = item.trained / item.value, text = `${item.name}: ${field === 4 ? flops(item.value) + " FLOPs" : item.value.toLocaleString("en") + " elements"}, ${percent(item.trained, item.value)} trained`;
    const tile = el("button", { class: "tile", type: "button", title: text, "aria-label": text, style: `left:${x}px;top:${y}px;width:${w}px;height:${h}px`, onclick: () => { if (inside < 0) { inside = item.key; treemap(); $("treemap-up").focus(); } } },
      el("i", { style: `height:${100 * share}%;${share ? "" : "border:0"}` }));
    if (w > 45 && h > 16) tile.append(el("b", {}, last(item.name).replace(/[._]/g, "$&\u200b"), ...(h > 40 ? [el("small", {}, percent(item.trained, item.value))] : [])));
    return tile;
  }));
  if (!tiles.length) $("treemap").replaceChildren(el("p", {}, "No FLOPs of their own here; choose elements."));
  $("treemap-up").hidden = inside < 0;
}

const columns = [["parameter", (p) => fqn(p)], ["shape", (p) => D.parameters[p][2].join(" x ")], ["elements", (p) => D.parameters[p][3]], ["dW FLOPs", (p) => D.parameters[p][4]],
  ["importance", (p) => plan.importance[p] ?? null], ["status", status]];
let sorted = { column: 0, up: true, used: false };
function table() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  // A dotted word matches whole path segments, so that layers.1 is not layers.10.
  const fits = (p) => words.every((word) => [fqn(p), ...D.parameters[p][1], status(p)].some((name) => word.includes(".") ? `.${name.toLowerCase()}.`.includes(`.${word.replace(/^\.|\.$/g, "")}.`) : name.toLowerCase().includes(word)));
  const rows = D.parameters.map((_, p) => p).filter(fits), value = columns[sorted.column][1];
  if (sorted.used) rows.sort((a, b) => { const [x, y] = [value(a), value(b)]; const order = x == null ? (y == null ? 0 : 1) : y == null ? -1 : x < y ? -1 : x > y ? 1 : 0; return x == null || y == null || sorted.up ? order : -order; });
  $("table").tHead.replaceChildren(el("tr", {}, ...columns.map(([name], c) => el("th", { scope: "col", "aria-sort": sorted.used && sorted.column === c ? (sorted.up ? "ascending" : "descending") : "none" },
    el("button", { type: "button", onclick: () => { sorted = { column: c, up: sorted.used && sorted.column === c ? !sorted.up : c < 2 || c === 5, used: true }; table(); $("table").tHead.querySelectorAll("button")[c].focus(); } }, name + (sorted.used && sorted.column === c ? (sorted.up ? " ▲" : " ▼") : ""))))));
  $("table").tBodies[0].replaceChildren(...rows.map((p) => el("tr", {}, el("td", {}, [fqn(p), ...D.parameters[p][1]].join(" = ")), el("td", {}, columns[1][1](p)), el("td", {}, D.parameters[p][3].toLocaleString("en")),
    el("td", {}, flops(D.parameters[p][4])), el("td", {}, short(plan.importance[p])), el("td", { class: status(p) === "trained" ? "trained" : "frozen" }, (status(p) === "trained" ? "● " : "○ ") + status(p)))));
  $("found").textContent = `${rows.length} of ${P}`;
}

const open = new Set();
function heat() {
  const groups = D.blocks.map((_, b) => D.parameters.flatMap((p, i) => (p[6] === b ? [i] : []))).map((members, b) => ({ b, members })).filter((g) => g.members.length);
  const sum = (which, members) => members.reduce((total, p) => total + (which.importance[p] || 0), 0);
  const strongest = (list) => Math.max(...D.plans.flatMap((which) => list.map((members) => Math.abs(sum(which, members)))), 1e-300);
  const most = strongest(groups.map((g) => g.members)), single = strongest(D.parameters.map((_, p) => [p]));
  const cell = (which, members, scale, text) => el("td", { class: which === plan && "now", title: `importance ${short(sum(which, members))}`, style: `background:rgba(var(--heat),${0.75 * Math.sqrt(Math.max(0, sum(which, members)) / scale)})` }, text);
  const rows = [];
  for (const { b, members } of groups) {
    const toggle = () => { if (!open.delete(b)) open.add(b); heat(); $("heat").querySelector(`[data-block="${b}"]`).focus(); };
    rows.push(el("tr", {}, el("th", { scope: "row" }, el("button", { type: "button", "data-block": b, "aria-expanded": String(open.has(b)), onclick: toggle }, (open.has(b) ? "▾ " : "▸ ") + D.blocks[b])),
      ...D.plans.map((which) => cell(which, members, most, `${members.filter((p) => which.trained.includes(p)).length}/${members.length}`))));
    if (open.has(b)) for (const p of members) rows.push(el("tr", { class: "sub" }, el("th", { scope: "row" }, fqn(p)), ...D.plans.map((which) => cell(which, [p], single, which.trained.includes(p) ? "● trained" : "○"))));
  }
  $("heat").tHead.replaceChildren(el("tr", {}, el("th", { scope: "col" }, "block"), ...D.plans.map((which) => el("th", { scope: "col", class: which === plan && "now" }, which.label))));
  $("heat").tBodies[0].replaceChildren(...rows);
}

function measured() {
  const full = D.totals.full_flops, summary = D.run && D.run.summary, steps = summary && summary.comparison, number = (n) => n.toLocaleString("en");
  const counted = (n, predicted) => n == null ? null : n === predicted ? "= predicted" : number(n), some = (n, text) => n == null ? null : text(n);
  const row = (p) => [p.label, p.steps, number(p.step_flops), counted(p.counted, p.step_flops), percent(p.step_flops, full), some(p.seconds, (x) => x.toFixed(4)), bytes(p.saved), some(p.saved_measured, bytes), some(p.peak, bytes), some(p.loss, short)];
  const whole = { label: "full step", step_flops: full, counted: steps && steps.full_flops, saved: D.totals.full_saved_bytes, saved_measured: steps && steps.full_saved_bytes, peak: steps && steps.full_peak_bytes };
  const head = ["plan", "steps", "FLOPs a step, predicted", "counted", "of full", "seconds a step", "saved for backward, predicted", "measured", "peak, measured", "mean loss"];
  const rows = [...D.plans, whole].map(row), used = head.map((_, c) => rows.some((cells) => cells[c] != null)), keep = (cells) => cells.filter((_, c) => used[c]);
  const parts = [el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Predicted and measured" }, el("table", {}, el("thead", {}, el("tr", {}, ...keep(head).map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...keep(cells).map((text) => el("td", {}, String(text ?? "–"))))))))];
  if (steps) parts.push(el("p", {}, `Last plan against a full step of plain PyTorch, forward and backward taken in turn: ${steps.plan_seconds.toFixed(4)} s against ${steps.full_seconds.toFixed(4)} s, ${percent(steps.plan_seconds, steps.full_seconds)} of the time for ${percent(D.plans[D.plans.length - 1].step_flops, full)} of the FLOPs.`));
  if (summary) parts.push(el("p", {}, `The whole run: ${short(summary.predicted_flops)} FLOPs predicted, ${short(summary.counted_flops)} counted, ${percent(summary.predicted_flops, summary.full_flops)} of full fine-tuning. Quality: ${Object.entries(summary.quality).map(([k, v]) => `${k} ${v.toFixed(1)}`).join(", ")}.`));
  const note = "Saved for backward: forward values that the backward reads; the prediction is made before a compiler chooses to recompute some.";
  parts.push(el("p", { class: "note" }, D.run ? `${note} Peak: most bytes that forward and backward hold at once, weights and optimizer apart. Seconds include the optimizer.` : `${note} Nothing was run for this report; gtcompile finetune counts, times and measures.`));
  if (D.run && D.run.losses.length > 1) parts.push(...lossChart(D.run.losses, D.run.stride));
  $("measures").replaceChildren(...parts);
}
function lossChart(losses, stride) {
  const top = Math.max(...losses), low = Math.min(...losses), svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), line = document.createElementNS(svg.namespaceURI, "polyline");
  svg.setAttribute("viewBox", "0 0 1000 100"); svg.setAttribute("preserveAspectRatio", "none"); svg.setAttribute("role", "img"); svg.setAttribute("aria-label", `Loss from ${losses[0]} to ${losses[losses.length - 1]}`);
  line.setAttribute("points", losses.map((loss, i) => `${(1000 * i) / (losses.length - 1)},${96 - (92 * (loss - low)) / (top - low || 1)}`).join(" "));
  svg.append(line);
  const ends = (kind, ...texts) => el("div", { class: kind, "aria-hidden": "true" }, ...texts.map((text) => el("span", {}, text)));
  return [el("h3", {}, stride > 1 ? `Loss, each point the mean of ${stride} steps` : "Loss by step"), el("div", { class: "chart" }, ends("y", short(top), short(low)), svg), ends("x", "step 1", `step ${losses.length * stride > 1 ? D.plans.reduce((n, p) => n + (p.steps || 0), 0) : 1}`)];
}

const members = D.blocks.map(() => []);
D.nodes.forEach((node, i) => members[node[BLOCK]].push(i));
function nodeButton(i) {
  const node = D.nodes[i], dead = !runs(i), kind = node[GRADIENT] >= 0 ? "grad" : node[PHASE] === BACKWARD ? "" : "fwd";
  return el("button", { type: "button", class: `node ${kind} ${dead ? "dead" : ""}`, "data-node": i, "aria-pressed": String(i === chosen), title: `${node[NAME]} ${D.operators[node[OP]]} ${node[SHAPE]}`, "aria-label": `${node[NAME]}, ${D.operators[node[OP]]}, ${dead ? "eliminated" : "runs"}`, onclick: () => choose(i, false) },
    el("b", {}, (dead ? "✕ " : "") + node[NAME]), el("span", {}, D.operators[node[OP]].replace(/^aten\./, "")), el("span", { class: "shape" }, node[SHAPE]), el("span", { class: "work" }, node[FLOPS] ? flops(node[FLOPS]) : ""));
}
function fill(details, b) {
  const sides = [["forward", (i) => D.nodes[i][PHASE] !== BACKWARD], ["backward", (i) => D.nodes[i][PHASE] === BACKWARD]];
  details.querySelector(".sides").replaceChildren(...sides.map(([name, side]) => el("div", {}, el("h4", {}, name), ...members[b].filter(side).map(nodeButton))));
}
function graph() {
  const opened = new Set([...$("blocks").querySelectorAll("details[open]")].map((d) => +d.dataset.block));
  $("blocks").replaceChildren(...D.blocks.map((name, b) => b).filter((b) => members[b].length).map((b) => {
    const dead = members[b].filter((i) => !runs(i)).length, back = members[b].filter((i) => D.nodes[i][PHASE] === BACKWARD).length;
    const details = el("details", { "data-block": b, open: opened.has(b) }, el("summary", {}, el("span", { class: back ? "mini" : "mini none", title: `${back - dead} of ${back} backward nodes run` }, el("i", { style: `width:${back ? (100 * (back - dead)) / back : 0}%` })), D.blocks[b] + " ", el("small", {}, `${members[b].length - back} forward, ${back} backward, ${dead} eliminated`)), el("div", { class: "sides" }));
    details.addEventListener("toggle", () => { if (details.open && !details.querySelector("[data-node]")) fill(details, b); }); // filled again, it would lose the focus
    if (opened.has(b)) fill(details, b);
    return details;
  }));
}
function pathFrom(i, ends) {
  const from = new Map([[i, -1]]), queue = [i];
  for (const at of queue) {
    if (ends.has(D.nodes[at][GRADIENT])) { const path = []; for (let n = at; n >= 0; n = from.get(n)) path.unshift(n); return path; }
    for (const next of readers[at]) if (D.nodes[next][PHASE] === BACKWARD && !from.has(next)) { from.set(next, at); queue.push(next); }
  }
  return [];
}
function why() {
  if (chosen < 0) return;
  const i = chosen, node = D.nodes[i], backward = node[PHASE] === BACKWARD;
  const all = backward ? parametersOf(i) : [...new Set(readers[i].filter((r) => D.nodes[r][PHASE] === BACKWARD).flatMap(parametersOf))];
  const needed = all.filter((p) => trained.has(p)), frozen = all.filter((p) => !trained.has(p)), ends = needed.length ? needed : frozen, path = pathFrom(i, new Set(ends));
  const said = node[PHASE] === INPUT ? `An input of the step; ${needed.length ? `the backward reads it for ${count(needed.length, "gradient")}` : "no gradient of this plan reads it"}.` : !backward ? (needed.length ? `Runs in the forward whatever is trained, and is saved for ${count(needed.length, "gradient")}.` : "Runs in the forward whatever is trained; no gradient of this plan reads it.")
    : needed.length ? `Runs for ${count(needed.length, "trained parameter")}.` : `Eliminated: it serves ${count(frozen.length, "parameter")}, none of them trained.`;
  const link = (n) => el("button", { type: "button", class: `node ${runs(n) ? "" : "dead"}`, onclick: () => choose(n, true) }, (runs(n) ? "" : "✕ ") + D.nodes[n][NAME]);
  const cost = stepFlops(mask), without = (ps) => cost - stepFlops(maskOf([...trained].filter((p) => !ps.includes(p))));
  const shown = path.length > 14 ? [...path.slice(0, 7), -1, ...path.slice(-7)] : path;
  $("why").replaceChildren(el("h3", {}, node[NAME]), el("p", {}, `${D.operators[node[OP]]}, ${node[SHAPE] || "several values"}, ${flops(node[FLOPS])} FLOPs, in ${D.modules[node[MODULE]] || "no module"}`), el("p", { class: "verdict" }, said));
  if (path.length) $("why").append(el("b", {}, needed.length ? "The way to a trained gradient" : "The way to a gradient that was dropped"), el("ol", {}, ...shown.map((n) => el("li", {}, n < 0 ? `… ${path.length - 14} more` : link(n)))), el("p", {}, `which is the gradient of ${fqn(D.nodes[path[path.length - 1]][GRADIENT])}`));
  if (needed.length) $("why").append(el("b", {}, "What freezing frees"), el("ul", {}, ...needed.slice(0, 8).map((p) => el("li", {}, `${fqn(p)} alone: ${flops(without([p]))} FLOPs`)), el("li", {}, `${needed.length > 1 ? `all ${needed.length}` : "with it"}: ${needed.length > 1 ? `${flops(without(needed))} FLOPs, and ` : ""}this ${backward ? "node goes" : "value is not kept"}`)));
  if (frozen.length) $("why").append(el("p", {}, `${needed.length ? "Also read for" : "Training one of these brings it back:"} ${frozen.slice(0, 8).map(fqn).join(", ")}${frozen.length > 8 ? ` and ${frozen.length - 8} more` : ""}${needed.length ? ", which are frozen." : "."}`));
}
function choose(i, scroll) {
  chosen = i;
  const details = $("blocks").querySelector(`details[data-block="${D.nodes[i][BLOCK]}"]`);
  if (!details.open) { details.open = true; fill(details, D.nodes[i][BLOCK]); }
  for (const button of $("blocks").querySelectorAll("[data-node]")) button.setAttribute("aria-pressed", String(+button.dataset.node === i));
  why();
  if (scroll) { const button = details.querySelector(`[data-node="${i}"]`); button.scrollIntoView({ block: "center" }); button.focus({ preventScroll: true }); }
}
function find() {
  const text = $("find").value.trim().toLowerCase(), hits = text ? D.nodes.flatMap((node, i) => (node[NAME].toLowerCase().includes(text) ? [i] : [])) : [];
  hits.sort((a, b) => D.nodes[a][NAME].length - D.nodes[b][NAME].length);
  $("hits").replaceChildren(...hits.slice(0, 12).map((i) => el("button", { type: "button", onclick: () => choose(i, true) }, D.nodes[i][NAME])), hits.length > 12 ? ` and ${hits.length - 12} more` : text && !hits.length ? "no node is called that" : "");
}

function draw() {
  trained = new Set(plan.trained); mask = maskOf(plan.trained);
  $("epoch-name").textContent = plan.label;
  overview(); treemap(); table(); heat(); graph(); why();
}
const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
$("theme").textContent = dark() ? "Light" : "Dark";
$("theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; $("theme").textContent = dark() ? "Light" : "Dark"; });
$("title").textContent = `${D.model}: ${D.architecture}`;
document.title = `${D.model} – gtcompile`;
$("subtitle").textContent = `${D.parameters.reduce((n, p) => n + p[3], 0).toLocaleString("en")} elements in ${P} parameters; batches of ${D.batch}`;
$("epoch").max = D.plans.length - 1; $("epoch").value = D.plans.length - 1; $("epoch-control").hidden = D.plans.length < 2;
$("epoch").addEventListener("input", () => { plan = D.plans[+$("epoch").value]; draw(); });
$("search").addEventListener("input", table); $("find").addEventListener("input", find);
$("area").addEventListener("change", treemap);
$("treemap-up").addEventListener("click", () => { inside = -1; treemap(); });
let resizing = 0; addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(treemap, 100); });
measured(); draw();
document.documentElement.dataset.ready = String(Math.round(performance.now()));
