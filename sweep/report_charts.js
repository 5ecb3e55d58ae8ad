"use strict";

const DEEPEST = 68; // percent of tint at which the text of a heatmap cell still reads well
const FULL = 30; // points of change that give the full tint

// -- heatmap -----------------------------------------------------------------------------------------------------------------

const heat = { sort: "", descending: false, marked: false };

function heatValue(cell, column) {
  const j = DIMS.findIndex((dim) => dim.id === column);
  return j >= 0 ? cell.d[j].delta : cell.v[column] ?? null;
}
function heatLines(cell, j) {
  const d = cell.d[j];
  const dense = cell.dense === null ? null : CELLS[cell.dense].d[j];
  const lines = [`${DIMS[j].name}: ${cell.label}`];
  if (d.valid === false) lines.push("Invalid: more than half of the answers are empty, unparseable or degenerate.");
  if (d.score !== null) lines.push(`Score ${number(d.score)}` + (dense && dense.score !== null ? `, dense ${number(dense.score)}` : ""));
  if (d.delta !== null && cell.dense !== cell.index) lines.push(`Change ${signed(d.delta)}` + (d.low === null ? "" : `, 95 % interval ${signed(d.low)} to ${signed(d.high)}`));
  if (d.refusal !== null) lines.push(`Refused ${percent(d.refusal)}` + (dense && dense.refusal !== null ? `, dense ${percent(dense.refusal)}` : ""));
  lines.push(cell.dense === cell.index ? "" : verdict(d));
  return lines;
}
function refusalMoved(cell, j) {
  if (cell.dense === null || cell.dense === cell.index) return false;
  const [here, there] = [cell.d[j].refusal, CELLS[cell.dense].d[j].refusal];
  return here !== null && there !== null && Math.abs(here - there) >= DATA.refusal_step;
}
function heatCell(cell, j) {
  const d = cell.d[j];
  const base = cell.dense === cell.index;
  const classes = ["d"];
  let text = "\u2013";
  const css = {};
  if (d.valid === false || d.score === null) {
    classes.push("void");
    if (d.valid === false) text = "invalid";
  } else if (base || d.delta === null) {
    text = number(d.score);
    if (!base) classes.push("void");
  } else {
    text = signed(d.delta);
    css["--t"] = `${(Math.min(1, Math.abs(d.delta) / FULL) * DEEPEST).toFixed(0)}%`;
    if (d.delta < 0) classes.push("down");
    if (d.mark === "worse" || d.mark === "better") classes.push("sure");
  }
  if (refusalMoved(cell, j)) classes.push("hatch");
  const mark = { worse: "\u25be", better: "\u25b4", same: "=" }[d.mark] ?? "";
  const node = el(
    "td",
    { class: classes.join(" "), css, "aria-label": heatLines(cell, j).filter(Boolean).join(". "), "data-dim": DIMS[j].id },
    text,
    el("span", { class: "mark", "aria-hidden": "true", text: base ? "" : mark }),
  );
  tipped(node, () => heatLines(cell, j));
  activate(node, () => openCell(cell.index));
  return node;
}
function sortButton(column, text) {
  const button = el("button", { type: "button", "data-sort": column, text });
  button.addEventListener("click", () => {
    if (heat.sort !== column) Object.assign(heat, { sort: column, descending: false });
    else if (!heat.descending) heat.descending = true;
    else Object.assign(heat, { sort: "", descending: false });
    drawHeat();
    byId("heat").querySelector(`[data-sort="${column}"]`).focus();
  });
  return button;
}
function drawHeat() {
  const extras = DATA.heat_extra.map((id) => METRICS.get(id));
  const columns = [...DIMS.map((dim) => [dim.id, dim.name]), ...extras.map((m) => [m.id, `${m.short ?? m.label}${m.unit === "GB" ? " GB" : ""}`])];
  const head = el(
    "tr",
    {},
    el("th", { scope: "col", text: "Cell" }),
    ...columns.map(([id, name]) => el("th", { scope: "col", "aria-sort": heat.sort === id ? (heat.descending ? "descending" : "ascending") : null }, sortButton(id, name))),
  );
  const body = [];
  const stops = [];
  for (const model of DATA.models) {
    let cells = CELLS.filter((cell) => cell.model === model.name && shown(cell));
    if (heat.marked) cells = cells.filter((cell) => cell.dense === cell.index || cell.d.some((d) => d.mark === "worse" || d.valid === false));
    if (!cells.length) continue;
    if (heat.sort) {
      const sign = heat.descending ? -1 : 1;
      const of = (cell) => heatValue(cell, heat.sort);
      cells.sort((a, b) => (of(a) === null) - (of(b) === null) || sign * (of(a) - of(b)));
    }
    body.push(el("tr", { class: "group" }, el("th", { scope: "rowgroup" }, el("bdi", { text: model.name })), el("td", { colspan: String(columns.length) })));
    for (const cell of cells) {
      const name = el("button", { type: "button", class: "link", "data-open": String(cell.index) }, el("bdi", { text: cell.label }));
      const tiles = DIMS.map((_, j) => heatCell(cell, j));
      stops.push(...tiles);
      body.push(
        el(
          "tr",
          { "data-cell": String(cell.index) },
          el("th", { scope: "row" }, el("span", { class: "dot", css: { "--c": methodColour(cell.method) } }), " ", name, cell.warnings ? el("a", { class: "flag", href: "#alarms", title: `${cell.warnings} warnings`, "aria-label": `${cell.warnings} warnings`, text: "!" }) : null),
          ...tiles,
          ...extras.map((m, i) => el("td", { class: i ? "num" : "num gap", text: withUnit(cell.v[m.id], { ...m, unit: "" }) })),
        ),
      );
    }
  }
  roving(stops, DIMS.length);
  const target = byId("heat");
  if (!body.length) {
    target.replaceChildren(el("p", { class: "empty", text: "No cell passes the filters." }));
    return;
  }
  target.replaceChildren(el("table", {}, el("caption", { class: "sr", text: "Change of every trust dimension against the dense model, in points" }), el("thead", {}, head), el("tbody", {}, ...body)));
}
byId("heat-marked").addEventListener("change", (event) => {
  heat.marked = event.target.checked;
  drawHeat();
});
views.push(drawHeat);

// -- scales ------------------------------------------------------------------------------------------------------------------

function niceTicks(low, high, count) {
  const raw = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw);
  const ticks = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step / 1e6; t += step) ticks.push(Number(t.toPrecision(12)));
  return ticks;
}
function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const k of [1, 2, 5]) if (k * 10 ** power >= low && k * 10 ** power <= high) ticks.push(k * 10 ** power);
  return ticks;
}
function scale(values, metric, from, to) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const log = metric.log && low > 0 && high / low > 4;
  const map = log ? Math.log10 : (x) => x;
  const pad = (map(high) - map(low) || 1) * 0.06;
  const [a, b] = [map(low) - pad, map(high) + pad];
  const at = (x) => from + ((map(x) - a) / (b - a)) * (to - from);
  const ends = log ? [10 ** a, 10 ** b] : [a, b];
  const ticks = log ? logTicks(...ends) : niceTicks(...ends, 6);
  return { at, ticks: ticks.length > 1 ? ticks : niceTicks(...ends, 4) };
}

// -- bars over the rate --------------------------------------------------------------------------------------------------------

const sizes = new Map();
for (const cell of CELLS) sizes.set(cell.model, (sizes.get(cell.model) ?? 0) + 1);
const largest = [...sizes].sort((a, b) => b[1] - a[1])[0][0];
const bars = { model: largest, dim: "" };

function rateGroups(model) {
  const variants = new Map();
  for (const cell of CELLS)
    if (cell.model === model.name && cell.dense !== cell.index && shown(cell)) {
      if (!variants.has(cell.variant)) variants.set(cell.variant, []);
      variants.get(cell.variant).push(cell);
    }
  const rates = new Map();
  for (const cells of variants.values()) {
    const rate = cells[0].rate;
    if (!rates.has(rate.label)) rates.set(rate.label, { ...rate, variants: [] });
    rates.get(rate.label).variants.push(cells);
  }
  const order = (cells) => DATA.methods.indexOf(cells[0].method);
  for (const rate of rates.values()) rate.variants.sort((a, b) => order(a) - order(b));
  return [...rates.values()].sort((a, b) => a.order - b.order);
}
function barChart(model, j, groups, width) {
  const height = width > 600 ? 320 : 200;
  const [left, right, top, bottom] = [30, width - 6, 28, height - 24];
  const y = (v) => bottom - (Math.max(0, Math.min(100, v)) / 100) * (bottom - top);
  const nodes = [svg("text", { class: "title", x: 0, y: 12 }, DIMS[j].name)];
  const dense = model.dense === null ? null : CELLS[model.dense].d[j];
  const small = model.small === null ? null : CELLS[model.small].d[j];
  if (dense && dense.score !== null) nodes.push(svg("rect", { class: "band", x: left, width: right - left, y: y(dense.score + DATA.limit), height: y(dense.score - DATA.limit) - y(dense.score + DATA.limit) }));
  for (const tick of [0, 25, 50, 75, 100]) {
    nodes.push(svg("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }));
    nodes.push(svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
  }
  const total = groups.reduce((sum, g) => sum + g.variants.length, 0);
  const gap = 16;
  const step = Math.min(34, (right - left - gap * (groups.length + 1)) / Math.max(1, total));
  const used = total * step + gap * (groups.length + 1);
  let x = left + gap + Math.max(0, (right - left - used) / 2);
  const tiles = [];
  for (const group of groups) {
    const start = x;
    for (const cells of group.variants) {
      const values = cells.map((cell) => cell.d[j].score).filter((v) => v !== null);
      const mean = values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
      const w = Math.max(2, step - 3);
      const label = cells.length > 1 ? `${cells[0].variant_label}, ${cells.length} seeds` : cells[0].label;
      const lines = [
        `${DIMS[j].name}: ${label}`,
        mean === null ? "No valid score" : `Score ${number(mean)}` + (dense && dense.score !== null ? `, ${signed(mean - dense.score)} against dense` : ""),
        values.length > 1 ? `Seeds ${values.map((v) => number(v)).join(", ")}` : "",
      ];
      const bar =
        mean === null
          ? svg("rect", { class: "mbar void", x, y: bottom - 12, width: w, height: 12 })
          : svg("rect", { class: "mbar", x, y: y(mean), width: w, height: Math.max(1, bottom - y(mean)), css: { "--c": methodColour(cells[0].method) } });
      build(bar, { role: "button", "aria-label": lines.filter(Boolean).join(". "), "data-cell": String(cells[0].index) }, []);
      tipped(bar, () => lines);
      activate(bar, () => openCell(cells[0].index));
      nodes.push(bar);
      tiles.push(bar);
      if (values.length > 1) {
        const mid = x + w / 2;
        nodes.push(svg("path", { class: "whisk", d: `M${mid - 3} ${y(Math.max(...values))}h6m-3 0V${y(Math.min(...values))}m-3 0h6` }));
        nodes.push(...values.map((v) => svg("circle", { class: "seed", cx: mid, cy: y(v), r: 1.9 })));
      }
      x += step;
    }
    if (step * group.variants.length > 14 || groups.length < 8) nodes.push(svg("text", { x: (start + x - 3) / 2, y: height - 8, "text-anchor": "middle" }, group.label));
    x += gap;
  }
  if (dense && dense.score !== null) nodes.push(svg("line", { class: "dense", x1: left, x2: right, y1: y(dense.score), y2: y(dense.score) }));
  if (small && small.score !== null) nodes.push(svg("line", { class: "small", x1: left, x2: right, y1: y(small.score), y2: y(small.score) }));
  nodes.push(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  roving(tiles);
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `${DIMS[j].name} by compression rate, ${model.name}` }, ...nodes);
}
function drawBars() {
  const picked = state.model || bars.model;
  const model = DATA.models.find((m) => m.name === picked);
  const target = byId("bars");
  byId("bars-model").value = picked;
  const groups = rateGroups(model);
  if (!groups.length || !DIMS.length) {
    target.replaceChildren(el("p", { class: "empty", text: DIMS.length ? "No compressed cell of this model passes the filters." : "No trust dimension was measured." }));
    return;
  }
  const list = DIMS.map((_, j) => j).filter((j) => !bars.dim || DIMS[j].id === bars.dim);
  const outer = target.clientWidth || 1100;
  const columns = list.length > 1 ? Math.max(1, Math.floor((outer + 29) / (400 + 29))) : 1;
  const width = Math.floor((outer - 29 * (columns - 1)) / columns);
  target.classList.toggle("one", list.length === 1);
  target.replaceChildren(...list.map((j) => el("div", {}, barChart(model, j, groups, width))));
  const small = byId("bars-small");
  small.hidden = model.small === null;
  if (model.small !== null) small.lastChild.textContent = ` smaller dense model: ${CELLS[model.small].model}`;
  const here = new Set(groups.flatMap((g) => g.variants.map((cells) => cells[0].method)));
  byId("bars-methods").replaceChildren(...DATA.methods.filter((m) => here.has(m)).map((m) => el("li", {}, el("span", { class: "dot", css: { "--c": methodColour(m) } }), m)));
}
{
  options(byId("bars-model"), DATA.models.map((m) => [m.name, m.name]), largest);
  options(byId("bars-dim"), [["", "All dimensions"], ...DIMS.map((dim) => [dim.id, dim.name])], "");
  byId("bars-model").addEventListener("change", (event) => {
    bars.model = event.target.value;
    if (state.model) {
      state.model = bars.model;
      byId("filter-model").value = bars.model;
      refresh();
    } else drawBars();
  });
  byId("bars-dim").addEventListener("change", (event) => {
    bars.dim = event.target.value;
    drawBars();
  });
}
views.push(drawBars);

// -- Pareto scatter ------------------------------------------------------------------------------------------------------------

const axes = { x: DATA.axes[0], y: DATA.axes[1] };

// Lower is better on both after the signs: x ascending, a point is on the frontier where no earlier one reaches its y.
// Exact duplicates stay together, as in `comptrust pareto`.
function frontier(points) {
  const order = points.map((_, i) => i).filter((i) => !Number.isNaN(points[i][0] + points[i][1])).sort((a, b) => points[a][0] - points[b][0] || points[a][1] - points[b][1]);
  const on = new Array(points.length).fill(false);
  let best = Infinity;
  let last = null;
  for (const i of order) {
    const [x, y] = points[i];
    if (y < best) {
      best = y;
      last = points[i];
      on[i] = true;
    } else if (last && x === last[0] && y === last[1]) on[i] = true;
  }
  return on;
}
const DRAWS = decodeDraws(DATA.draws);
function decodeDraws(packed) {
  if (!packed) return null;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const noise = new Int8Array(bytes(packed.data));
  const source = new Int16Array(bytes(packed.source));
  const columns = new Map(packed.metrics.map((id, m) => [id, m]));
  const row = (cell, id) => cell * packed.metrics.length + columns.get(id);
  const swapped = new Array(CELLS.length).fill(false);
  source.forEach((drawn, at) => {
    if (drawn !== at % CELLS.length) swapped[at % CELLS.length] = true;
  });
  return {
    count: packed.count,
    // Value of a metric in one draw: that of the seed drawn for the cell, moved by the prompts drawn. NaN where that seed has none.
    at(cell, id, draw) {
      const drawn = source[draw * CELLS.length + cell.index];
      const value = CELLS[drawn].v[id] ?? NaN;
      return columns.has(id) ? value + (noise[row(drawn, id) * packed.count + draw] / 127) * packed.scale[row(drawn, id)] : value;
    },
    varies: (cell, id) => swapped[cell.index] || (columns.has(id) && packed.scale[row(cell.index, id)] > 0),
  };
}
function probabilities(cells, sign) {
  const varies = cells.map((cell) => DRAWS !== null && (DRAWS.varies(cell, axes.x) || DRAWS.varies(cell, axes.y)));
  if (!varies.some(Boolean)) return null;
  const hits = new Array(cells.length).fill(0);
  for (let draw = 0; draw < DRAWS.count; draw++) {
    const on = frontier(cells.map((cell) => [sign.x * DRAWS.at(cell, axes.x, draw), sign.y * DRAWS.at(cell, axes.y, draw)]));
    on.forEach((yes, i) => (hits[i] += yes));
  }
  return hits.map((n, i) => (varies[i] ? n / DRAWS.count : null));
}
const SHAPES = {
  dense: (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
  quantisation: (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  pruning: (x, y, r) => `M${x} ${y - r * 1.25}L${x + r * 1.2} ${y + r * 0.85}H${x - r * 1.2}z`,
};
function drawScatter() {
  const target = byId("scatter");
  const [mx, my] = [METRICS.get(axes.x), METRICS.get(axes.y)];
  const pool = CELLS.filter(shown);
  const cells = pool.filter((cell) => Number.isFinite(cell.v[axes.x]) && Number.isFinite(cell.v[axes.y]));
  const missing = pool.length - cells.length;
  byId("scatter-missing").textContent = missing ? `${missing} of ${pool.length} cells have no value on one of the axes and are left out.` : "";
  if (!cells.length) {
    target.replaceChildren(el("p", { class: "empty", text: "No cell has values on both axes." }));
    byId("frontier").replaceChildren();
    return;
  }
  const sign = { x: mx.better === "max" ? -1 : 1, y: my.better === "max" ? -1 : 1 };
  const on = frontier(cells.map((cell) => [sign.x * cell.v[axes.x], sign.y * cell.v[axes.y]]));
  const chance = probabilities(cells, sign);
  const width = target.clientWidth || 1100;
  const height = Math.max(320, Math.min(500, width * 0.5));
  const [left, right, top, bottom] = [52, width - 14, 14, height - 44];
  const x = scale(cells.map((cell) => cell.v[axes.x]), mx, left, right);
  const y = scale(cells.map((cell) => cell.v[axes.y]), my, bottom, top);
  const nodes = [];
  for (const t of y.ticks) nodes.push(svg("line", { class: "grid", x1: left, x2: right, y1: y.at(t), y2: y.at(t) }), svg("text", { x: left - 8, y: y.at(t) + 4, "text-anchor": "end" }, number(t, t % 1 ? 2 : 0)));
  for (const t of x.ticks) nodes.push(svg("line", { class: "grid", y1: top, y2: bottom, x1: x.at(t), x2: x.at(t) }), svg("text", { x: x.at(t), y: bottom + 18, "text-anchor": "middle" }, number(t, t % 1 ? 2 : 0)));
  const arrow = (m) => `${m.label}${m.unit ? ` (${m.unit})` : ""}, ${m.better === "max" ? "more" : "less"} is better`;
  nodes.push(svg("text", { x: right, y: height - 6, "text-anchor": "end" }, arrow(mx)), svg("text", { transform: `translate(13 ${top}) rotate(-90)`, "text-anchor": "end" }, arrow(my)));
  const front = cells.map((cell, i) => ({ cell, i })).filter(({ i }) => on[i]);
  front.sort((a, b) => a.cell.v[axes.x] - b.cell.v[axes.x]);
  nodes.push(svg("path", { class: "front-line", d: front.map(({ cell }, k) => `${k ? "L" : "M"}${x.at(cell.v[axes.x]).toFixed(1)} ${y.at(cell.v[axes.y]).toFixed(1)}`).join("") }));
  const order = cells.map((_, i) => i).sort((a, b) => on[a] - on[b] || cells[a].v[axes.x] - cells[b].v[axes.x]);
  const points = [];
  for (const i of order) {
    const cell = cells[i];
    const [cx, cy] = [x.at(cell.v[axes.x]), y.at(cell.v[axes.y])];
    const chosen = state.chosen.includes(cell.index);
    const lines = [
      `${cell.model} \u00b7 ${cell.label}`,
      `${mx.label} ${withUnit(cell.v[axes.x], mx)}`,
      `${my.label} ${withUnit(cell.v[axes.y], my)}`,
      chance && chance[i] !== null ? `On the frontier in ${percent(chance[i])} of ${DRAWS.count} draws` : on[i] ? "On the frontier" : "Dominated",
      cell.invalid ? "Some dimensions are invalid" : "",
    ];
    const point = svg("path", {
      class: ["pt", on[i] && "front", chosen && "chosen", !on[i] && !(chance?.[i] >= 0.05) && "off"].filter(Boolean).join(" "),
      d: SHAPES[cell.family](cx, cy, on[i] ? 6.5 : 5),
      css: { "--c": methodColour(cell.method) },
      role: "button",
      "aria-pressed": String(chosen),
      "aria-label": lines.filter(Boolean).join(". "),
      "data-cell": String(cell.index),
    });
    tipped(point, () => lines);
    activate(point, () => toggleChosen(cell));
    nodes.push(point);
    points.push(point);
  }
  let edge = -Infinity;
  for (const { cell } of front) {
    const at = x.at(cell.v[axes.x]);
    const flip = at > right - 130;
    const start = flip ? at - 10 - cell.label.length * 6.4 : at + 9;
    if (start < edge) continue;
    edge = (flip ? at : start + cell.label.length * 6.4) + 6;
    nodes.push(svg("text", { class: "plab", x: flip ? at - 10 : at + 9, y: y.at(cell.v[axes.y]) - 9, "text-anchor": flip ? "end" : "start", "aria-hidden": "true" }, cell.label));
  }
  roving([...points].sort((a, b) => CELLS[a.dataset.cell].v[axes.x] - CELLS[b.dataset.cell].v[axes.x]));
  target.replaceChildren(svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `${my.label} against ${mx.label}, one point a cell` }, ...nodes));
  drawFrontierTable(cells, on, chance, mx, my);
}
function drawFrontierTable(cells, on, chance, mx, my) {
  const rows = cells
    .map((cell, i) => ({ cell, on: on[i], chance: chance ? chance[i] : null }))
    .filter((row) => row.on || (row.chance !== null && row.chance >= 0.05))
    .sort((a, b) => b.on - a.on || (b.chance ?? 0) - (a.chance ?? 0) || a.cell.v[axes.x] - b.cell.v[axes.x]);
  const head = ["Cell", mx.label, my.label, "On the frontier", ...(chance ? ["Probability"] : [])];
  byId("frontier").replaceChildren(
    el(
      "table",
      { class: "stack" },
      el("thead", {}, el("tr", {}, ...head.map((text, i) => el("th", { scope: "col", class: i && i !== 3 ? "num" : null, text })))),
      el(
        "tbody",
        {},
        ...rows.map(({ cell, on: yes, chance: p }) =>
          el(
            "tr",
            { "data-cell": String(cell.index) },
            el("th", { scope: "row" }, el("button", { type: "button", class: "link", "data-open": String(cell.index) }, el("bdi", { text: `${cell.model} \u00b7 ${cell.label}` }))),
            el("td", { class: "num", "data-label": mx.label, text: withUnit(cell.v[axes.x], mx) }),
            el("td", { class: "num", "data-label": my.label, text: withUnit(cell.v[axes.y], my) }),
            el("td", { "data-label": "On the frontier", text: yes ? "yes" : "not at the point estimate" }),
            chance ? el("td", { class: "num", "data-label": "Probability", text: percent(p) }) : null,
          ),
        ),
      ),
    ),
  );
}
{
  const entries = DATA.metrics.map((m) => [m.id, m.label]);
  for (const axis of ["x", "y"]) {
    const select = byId(`axis-${axis}`);
    options(select, entries, axes[axis]);
    select.addEventListener("change", () => {
      axes[axis] = select.value;
      drawScatter();
    });
  }
}
views.push(drawScatter);

// -- radar ---------------------------------------------------------------------------------------------------------------------

const SERIES = ["var(--m-gptq)", "var(--m-wanda)", "var(--m-awq)", "var(--m-sparsegpt)", "var(--m-llm_int8)", "var(--m-smoothquant)"];
function drawRadar() {
  const chosen = state.chosen.map((i) => CELLS[i]);
  const select = byId("radar-add");
  const rest = CELLS.filter((cell) => !state.chosen.includes(cell.index) && shown(cell));
  options(select, [["", "Add a cell\u2026"], ...rest.map((cell) => [String(cell.index), `${cell.model} \u00b7 ${cell.label}`])], "");
  const target = byId("radar");
  if (!chosen.length || DIMS.length < 3) {
    target.replaceChildren(el("p", { class: "empty", text: DIMS.length < 3 ? "A profile needs three trust dimensions or more." : "No cell chosen: pick one from the list, or a point of the Pareto chart." }));
    byId("radar-table").replaceChildren();
    return;
  }
  const size = 440;
  const [cx, cy, radius] = [size / 2, size / 2 - 8, 158];
  const spot = (j, value) => {
    const angle = (j / DIMS.length) * 2 * Math.PI - Math.PI / 2;
    return [cx + Math.cos(angle) * radius * (value / 100), cy + Math.sin(angle) * radius * (value / 100)];
  };
  const ring = (value) => DIMS.map((_, j) => spot(j, value).map((v) => v.toFixed(1)).join(",")).join(" ");
  const nodes = [];
  for (const value of [25, 50, 75, 100]) {
    nodes.push(svg("polygon", { class: "grid", points: ring(value) }));
    // ring labels stand between two axes, where no axis name is
    const angle = Math.PI / DIMS.length - Math.PI / 2;
    const r = radius * (value / 100) * Math.cos(Math.PI / DIMS.length);
    nodes.push(svg("text", { class: "ring", x: cx + Math.cos(angle) * r, y: cy + Math.sin(angle) * r + 4, "text-anchor": "middle" }, String(value)));
  }
  DIMS.forEach((dim, j) => {
    const [px, py] = spot(j, 100);
    nodes.push(svg("line", { class: "grid", x1: cx, y1: cy, x2: px, y2: py }));
    const [tx, ty] = spot(j, 111);
    nodes.push(svg("text", { x: tx, y: ty + 4, "text-anchor": Math.abs(tx - cx) < 4 ? "middle" : tx > cx ? "start" : "end" }, dim.name));
  });
  chosen.forEach((cell, k) => {
    const colour = cell.dense === cell.index ? "var(--m-dense)" : SERIES[k % SERIES.length];
    // a missing score breaks the outline instead of pulling it to the centre
    const parts = [];
    DIMS.forEach((_, j) => {
      const [here, next] = [cell.d[j].score, cell.d[(j + 1) % DIMS.length].score];
      if (here !== null && next !== null) parts.push(`M${spot(j, here).map((v) => v.toFixed(1)).join(" ")}L${spot((j + 1) % DIMS.length, next).map((v) => v.toFixed(1)).join(" ")}`);
    });
    const whole = cell.d.every((d) => d.score !== null);
    const path = whole ? `M${DIMS.map((_, j) => spot(j, cell.d[j].score).map((v) => v.toFixed(1)).join(" ")).join("L")}Z` : parts.join("");
    nodes.push(svg("path", { class: `poly${cell.dense === cell.index ? " base" : ""}`, d: path, css: { "--c": colour }, "data-cell": String(cell.index) }));
  });
  target.replaceChildren(svg("svg", { viewBox: `0 0 ${size} ${size - 30}`, width: size, height: size - 30, role: "img", "aria-label": `Scores of ${chosen.map((c) => c.label).join(", ")}; the table beside it holds the values` }, ...nodes));
  const head = el("tr", {}, el("th", { scope: "col", text: "Score" }), ...chosen.map((cell, k) => {
    const colour = cell.dense === cell.index ? "var(--m-dense)" : SERIES[k % SERIES.length];
    const drop = el("button", { type: "button", class: "link", "aria-label": `Remove ${cell.label}`, text: "remove" });
    drop.addEventListener("click", () => toggleChosen(cell));
    return el("th", { scope: "col", class: "num" }, el("span", { class: "dot", css: { "--c": colour } }), " ", el("bdi", { text: cell.label }), el("br"), el("small", {}, el("bdi", { text: cell.model })), el("br"), drop);
  }));
  const rows = DIMS.map((dim, j) => el("tr", {}, el("th", { scope: "row", text: dim.name }), ...chosen.map((cell) => el("td", { class: "num", text: cell.d[j].valid === false ? "invalid" : number(cell.d[j].score) }))));
  byId("radar-table").replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}
byId("radar-add").addEventListener("change", (event) => {
  if (event.target.value) toggleChosen(CELLS[Number(event.target.value)]);
});
views.push(drawRadar);
