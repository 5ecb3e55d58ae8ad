"use strict";

const PAGE = 12;
const explorer = { cell: "", dim: "", change: "", query: "", page: 0, unveil: false };
const ITEMS = DATA.items.rows.map(([cell, dim, scenario, item, sample, before, after, scoreBefore, scoreAfter, textBefore, textAfter, target, veil]) => ({
  cell,
  dim: DATA.items.dims[dim],
  scenario: DATA.items.scenarios[scenario],
  item,
  sample,
  before: before === null ? null : DATA.items.outcomes[before],
  after: DATA.items.outcomes[after],
  scoreBefore,
  scoreAfter,
  textBefore: textBefore === null ? null : DATA.items.texts[textBefore],
  textAfter: textAfter === null ? null : DATA.items.texts[textAfter],
  target: target === null ? null : DATA.items.texts[target],
  veil,
}));
const changeOf = (row) => (row.before === null ? `${row.after}` : row.before === row.after ? `${row.after}, unchanged` : `${row.before} \u2192 ${row.after}`);

function answer(title, outcome, score, text, veil, reveal) {
  const heading = el("h4", {}, title, outcome ? el("span", { class: "pill", text: outcome }) : null, score === null || score === undefined ? null : `score ${number(score, 2)}`);
  if (text === null) return el("div", {}, heading, el("p", { class: "note", text: outcome ? "Text was not kept, only its hash." : "No answer stored." }));
  if (text === "") return el("div", {}, heading, el("p", { class: "note", text: "(empty)" }));
  const body = el("pre", { class: "text", text, dir: "ltr" });
  if (!veil) return el("div", {}, heading, body);
  // blurred text also stays away from screen readers and the clipboard until it is asked for
  body.setAttribute("aria-hidden", "true");
  return el("div", {}, heading, el("div", { class: "veil" }, body, el("button", { type: "button", text: "Show text", on: { click: reveal } })));
}
function itemCard(row, asked) {
  const cell = CELLS[row.cell];
  const veil = row.veil && !asked && !explorer.unveil;
  const reveal = (event) => {
    const card = itemCard(row, true);
    event.target.closest("article").replaceWith(card);
    card.focus();
  };
  const name = DIMS.find((dim) => dim.id === row.dim)?.name ?? row.dim;
  const tone = row.before === row.after || row.before === null ? "" : row.after === "correct" ? " yes" : ["wrong", "degenerate", "unparseable", "empty"].includes(row.after) ? " no" : " unsure";
  return el(
    "article",
    { class: "item", tabindex: asked ? "-1" : null, "data-dim": row.dim, "data-change": changeOf(row) },
    el(
      "header",
      {},
      el("strong", { text: name }),
      row.scenario ? el("bdi", { text: row.scenario }) : null,
      el("bdi", { class: "id", text: row.sample ? `${row.item} #${row.sample}` : row.item }),
      el("span", { class: `pill${tone} push`, text: changeOf(row) }),
    ),
    el(
      "div",
      { class: "answers" },
      answer("Dense", row.before, row.scoreBefore, row.before === null ? null : row.textBefore, veil, reveal),
      answer(cell.label, row.after, row.scoreAfter, row.textAfter, veil, reveal),
    ),
    row.target ? el("details", { class: "target" }, el("summary", { text: "What the scorer knew" }), el("pre", { class: "text", text: row.target })) : null,
  );
}
function drawItems() {
  const target = byId("items-list");
  const rows = ITEMS.filter(
    (row) =>
      (!explorer.cell || row.cell === Number(explorer.cell)) &&
      (!explorer.dim || row.dim === explorer.dim) &&
      (!explorer.change || (explorer.change === "*" ? row.before !== null && row.before !== row.after : changeOf(row) === explorer.change)) &&
      (!explorer.query || `${row.item} ${row.scenario} ${row.textAfter ?? ""} ${row.textBefore ?? ""}`.toLowerCase().includes(explorer.query)),
  );
  const pages = Math.max(1, Math.ceil(rows.length / PAGE));
  explorer.page = Math.min(explorer.page, pages - 1);
  const part = rows.slice(explorer.page * PAGE, (explorer.page + 1) * PAGE);
  target.replaceChildren(...(part.length ? part.map((row) => itemCard(row, false)) : [el("p", { class: "empty", text: "No stored answer passes these filters." })]));
  byId("items-count").textContent = rows.length ? `${explorer.page * PAGE + 1}\u2013${explorer.page * PAGE + part.length} of ${rows.length}` : "0";
  byId("items-back").disabled = explorer.page === 0;
  byId("items-next").disabled = explorer.page >= pages - 1;
}
if (ITEMS.length) {
  const cells = [...new Set(ITEMS.map((row) => row.cell))].sort((a, b) => a - b);
  explorer.cell = String(DATA.items.first ?? cells[0]);
  options(byId("items-cell"), [["", "All cells"], ...cells.map((i) => [String(i), `${CELLS[i].model} \u00b7 ${CELLS[i].label}`])], explorer.cell);
  options(byId("items-dim"), [["", "All dimensions"], ...DIMS.filter((dim) => ITEMS.some((row) => row.dim === dim.id)).map((dim) => [dim.id, dim.name])], "");
  const changes = [...new Set(ITEMS.map(changeOf))].sort();
  options(byId("items-change"), [["", "All outcomes"], ["*", "Changed against dense"], ...changes.map((text) => [text, text])], "");
  for (const [id, field] of [["items-cell", "cell"], ["items-dim", "dim"], ["items-change", "change"]])
    byId(id).addEventListener("change", (event) => {
      Object.assign(explorer, { [field]: event.target.value, page: 0 });
      drawItems();
    });
  byId("items-find").addEventListener("input", (event) => {
    Object.assign(explorer, { query: event.target.value.trim().toLowerCase(), page: 0 });
    drawItems();
  });
  byId("items-unveil").addEventListener("change", (event) => {
    explorer.unveil = event.target.checked;
    drawItems();
  });
  for (const [id, step] of [["items-back", -1], ["items-next", 1]])
    byId(id).addEventListener("click", () => {
      explorer.page += step;
      drawItems();
      byId("items").scrollIntoView();
    });
  drawItems();
}

refresh();
let drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === drawnWidth) return;
  drawnWidth = innerWidth;
  drawBars();
  drawScatter();
});
document.documentElement.dataset.ready = "true";
