"use strict";
// Text reaches the page through textContent alone: model output is hostile input.

const DATA = JSON.parse(document.getElementById("data").textContent);
const DIMS = DATA.dims;
const CELLS = DATA.cells.map((cell, index) => ({
  ...cell,
  index,
  d: cell.d.map(([score, valid, refusal, delta, low, high, p, mark, unstable]) => ({ score, valid, refusal, delta, low, high, p, mark, unstable })),
}));
const METRICS = new Map(DATA.metrics.map((m) => [m.id, m]));
const MINUS = "\u2212";

function build(node, attrs, children) {
  for (const [name, value] of Object.entries(attrs ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (name === "css") for (const [property, setting] of Object.entries(value)) node.style.setProperty(property, setting);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attrs, ...children) => build(document.createElement(tag), attrs, children);
const svg = (tag, attrs, ...children) => build(document.createElementNS("http://www.w3.org/2000/svg", tag), attrs, children);
const byId = (id) => document.getElementById(id);
const methodColour = (method) => `var(--m-${method}, var(--soft))`;

function number(value, digits = 1) {
  if (value === null || value === undefined) return "\u2013";
  return value.toFixed(digits).replace("-", MINUS);
}
function signed(value, digits = 1) {
  if (value === null || value === undefined) return "\u2013";
  const text = number(value, digits);
  return value > 0 && Number(value.toFixed(digits)) !== 0 ? `+${text}` : text;
}
const percent = (value) => (value === null || value === undefined ? "\u2013" : `${Math.round(value * 100)} %`);
function withUnit(value, metric) {
  if (value === null || value === undefined) return "\u2013";
  const digits = metric.digits ?? (Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : Math.abs(value) >= 1 ? 2 : 3);
  return number(value, digits) + (metric.unit ? ` ${metric.unit}` : "");
}
function pValue(p) {
  if (p === null || p === undefined) return "";
  return p < 0.001 ? "adjusted p < 0.001" : `adjusted p = ${p.toFixed(3)}`;
}

// -- state: what is shown, and who redraws when it changes ---------------------------------------------------------------

const state = { model: "", methods: new Set(), query: "", chosen: [...DATA.chosen] };
const views = [];
function refresh() {
  for (const view of views) view();
}
function shown(cell) {
  if (state.model && cell.model !== state.model) return false;
  if (state.methods.size && !state.methods.has(cell.method)) return false;
  return !state.query || cell.search.includes(state.query);
}
function toggleChosen(cell) {
  const at = state.chosen.indexOf(cell.index);
  if (at >= 0) state.chosen.splice(at, 1);
  else state.chosen = [...state.chosen, cell.index].slice(-DATA.most_chosen);
  refresh();
}

// -- tooltip ---------------------------------------------------------------------------------------------------------------

const tip = el("div", { class: "tip", role: "status", hidden: true });
document.body.append(tip);
function showTip(lines, anchor) {
  const [title, ...rest] = lines;
  tip.replaceChildren(el("b", { text: title }), ...rest.filter(Boolean).map((line) => el("div", { text: line })));
  tip.hidden = false;
  const box = anchor.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - size.width / 2), innerWidth - size.width - 8);
  const above = box.top - size.height - 10;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : Math.min(box.bottom + 10, innerHeight - size.height - 4)}px`;
}
const hideTip = () => (tip.hidden = true);
function tipped(node, lines) {
  for (const event of ["pointerenter", "focus"]) node.addEventListener(event, () => showTip(lines(), node));
  for (const event of ["pointerleave", "blur"]) node.addEventListener(event, hideTip);
  return node;
}
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

// One tab stop for a group; arrow keys move inside it. `columns` > 0 makes it a grid.
function roving(nodes, columns = 0) {
  nodes.forEach((node, i) => node.setAttribute("tabindex", i ? "-1" : "0"));
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns || 1, ArrowUp: -(columns || 1) };
  nodes.forEach((node, i) => {
    node.addEventListener("keydown", (event) => {
      let to = null;
      if (event.key in moves) to = i + moves[event.key];
      else if (event.key === "Home") to = columns ? i - (i % columns) : 0;
      else if (event.key === "End") to = columns ? i - (i % columns) + columns - 1 : nodes.length - 1;
      if (to === null || !nodes[to]) return;
      event.preventDefault();
      node.setAttribute("tabindex", "-1");
      nodes[to].setAttribute("tabindex", "0");
      nodes[to].focus();
    });
  });
}
function activate(node, action) {
  node.addEventListener("click", action);
  node.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    action(event);
  });
}

// -- theme -----------------------------------------------------------------------------------------------------------------

const themeButton = byId("theme");
const themes = ["auto", "light", "dark"];
function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  themeButton.textContent = { auto: "Theme: auto", light: "Theme: light", dark: "Theme: dark" }[theme];
  themeButton.dataset.current = theme;
}
themeButton.hidden = false;
setTheme("auto");
themeButton.addEventListener("click", () => setTheme(themes[(themes.indexOf(themeButton.dataset.current) + 1) % themes.length]));

// -- filters ---------------------------------------------------------------------------------------------------------------

function options(select, entries, current) {
  select.replaceChildren(...entries.map(([value, text]) => el("option", { value, text, selected: value === current })));
}
const usedMethods = DATA.methods.filter((m) => CELLS.some((cell) => cell.method === m));
{
  const model = byId("filter-model");
  options(model, [["", "All models"], ...DATA.models.map((m) => [m.name, m.name])], "");
  model.addEventListener("change", () => {
    state.model = model.value;
    refresh();
  });
  const find = byId("filter-find");
  find.addEventListener("input", () => {
    state.query = find.value.trim().toLowerCase();
    refresh();
  });
  const chips = byId("filter-methods");
  for (const method of usedMethods) {
    const button = el("button", { type: "button", "aria-pressed": "true", "data-method": method }, el("span", { class: "dot", css: { "--c": methodColour(method) } }), method);
    button.addEventListener("click", () => {
      if (state.methods.has(method)) state.methods.delete(method);
      else state.methods.add(method);
      if (state.methods.size === usedMethods.length) state.methods.clear();
      refresh();
    });
    chips.append(button);
  }
  byId("filter-reset").addEventListener("click", () => {
    Object.assign(state, { model: "", methods: new Set(), query: "" });
    model.value = find.value = "";
    refresh();
  });
  views.push(() => {
    const count = CELLS.filter(shown).length;
    byId("filter-count").textContent = count === CELLS.length ? `${count} cells` : `${count} of ${CELLS.length} cells`;
    for (const button of chips.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(!state.methods.size || state.methods.has(button.dataset.method)));
  });
}

// -- one cell in full --------------------------------------------------------------------------------------------------------

const dialog = byId("cell");
function openCell(index) {
  const cell = CELLS[index];
  hideTip();
  byId("cell-title").replaceChildren(el("bdi", { text: cell.model }), " \u00b7 ", el("bdi", { text: cell.label }));
  const rows = DIMS.map((dim, j) => {
    const d = cell.d[j];
    return el(
      "tr",
      {},
      el("th", { scope: "row", text: dim.name }),
      el("td", { class: "num", text: d.valid === false ? "invalid" : number(d.score) }),
      el("td", { class: "num", text: cell.dense === cell.index ? "" : signed(d.delta) }),
      el("td", { class: "num", text: d.low === null ? "" : `${signed(d.low)} to ${signed(d.high)}` }),
      el("td", { class: "num", text: percent(d.refusal) }),
      el("td", { text: verdict(d) }),
    );
  });
  const head = ["Dimension", "Score", "Against dense", "95 % interval", "Refused", ""].map((text, i) => el("th", { scope: "col", class: i && i < 5 ? "num" : null, text }));
  byId("cell-body").replaceChildren(
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows))),
    el("dl", { class: "pairs" }, ...cell.facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", {}, el("bdi", { text: value }))))),
  );
  byId("cell-choose").textContent = state.chosen.includes(index) ? "Remove from profile" : "Add to profile";
  dialog.dataset.cell = index;
  if (!dialog.open) dialog.showModal();
}
function verdict(d) {
  const words = {
    worse: d.p === null ? "worse by more than the limit" : "worse than dense",
    better: d.p === null ? "better by more than the limit" : "better than dense",
    same: "equal within the limit",
  };
  return [words[d.mark], pValue(d.p), d.unstable && "seed-unstable"].filter(Boolean).join(", ");
}
byId("cell-close").addEventListener("click", () => dialog.close());
byId("cell-choose").addEventListener("click", () => {
  toggleChosen(CELLS[Number(dialog.dataset.cell)]);
  dialog.close();
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
document.addEventListener("click", (event) => {
  const link = event.target.closest("[data-open]");
  if (link) openCell(Number(link.dataset.open));
});
