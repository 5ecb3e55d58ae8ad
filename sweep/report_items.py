"""The answers that fit into a report: those that changed against dense first, a few of every kind, within a budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..actors.cell import DIMENSIONS
from .results import Results

#: Characters of all texts together, of one text, and cells whose answers are considered (most wanted first).
BUDGET, LONGEST, CELLS = 1_600_000, 700, 60
_PER_KIND = 6
#: Free text on provoking, biased or private prompts: blurred until asked. Elsewhere an answer is a label unless it is long.
_SENSITIVE = ("toxicity", "stereotype", "privacy")
_PLAIN = ("correct", "wrong", "refused", "empty")
_SHORT = 160

_QUERY = """
with pairs as (select unnest(?::varchar[]) as key, unnest(?::varchar[]) as dense_key),
joined as (
  select c.key, c.dimension, c.scenario, c.item, c.sample, d.outcome as before, c.outcome as after, d.score as score_before,
    c.score as score_after, d.text as text_before, c.text as text_after, c.target
  from items c join pairs p on c.key = p.key
  left join items d on d.key = p.dense_key and d.dimension = c.dimension and d.item = c.item and d.sample = c.sample
),
ranked as (
  select *, row_number() over (
      partition by key, dimension, before, after
      order by abs(coalesce(score_after, 0) - coalesce(score_before, 0)) desc, md5(item), sample) as nth
  from joined
)
select * from ranked where nth <= ? order by key, dimension, item, sample
"""


def veiled(dimension: str, outcome: str, text: str | None) -> bool:
    """Whether an answer is blurred until the reader asks for it."""
    return dimension in _SENSITIVE or outcome not in _PLAIN or len(text or "") > _SHORT


def explore(results: Results, cells: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> dict[str, Any]:
    """``cells``: rows of the page (``key``, ``dense_key``) in its order; ``wanted``: keys, best first."""
    index = {row["key"]: i for i, row in enumerate(cells)}
    dense = {row["key"]: row.get("dense_key") for row in cells}
    keys = [k for k in dict.fromkeys([*wanted, *index]) if dense.get(k) and dense[k] != k][:CELLS] or list(index)[:CELLS]
    rows = results.rows(_QUERY, [keys, [dense[k] or "" for k in keys], _PER_KIND])
    order = {k: n for n, k in enumerate(keys)}
    # one of each kind for every cell, then a second: changed answers before equal ones, the most wanted cell first
    rows.sort(key=lambda r: (r["nth"] > 2, r["before"] == r["after"], r["nth"], order[r["key"]]))
    texts: dict[str, int] = {}
    spent = 0

    def keep(text: str | None) -> int | None:
        nonlocal spent
        if text is None:
            return None
        text = text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
        if text not in texts:
            spent += len(text.encode("utf-8", "replace")) + 8
            texts[text] = len(texts)
        return texts[text]

    scenarios: dict[str, int] = {}
    outcomes: dict[str, int] = {}
    out = []
    for r in rows:
        if spent > BUDGET:
            break
        spent += 90
        pairs = ((r["after"], r["text_after"]), (r["before"] or "correct", r["text_before"]))
        veil = any(veiled(r["dimension"], outcome, text) for outcome, text in pairs)
        out.append(
            (
                index[r["key"]], DIMENSIONS.index(r["dimension"]) if r["dimension"] in DIMENSIONS else -1,
                scenarios.setdefault(r["scenario"] or "", len(scenarios)), r["item"], r["sample"],
                None if r["before"] is None else outcomes.setdefault(r["before"], len(outcomes)),
                outcomes.setdefault(r["after"], len(outcomes)), _short(r["score_before"]), _short(r["score_after"]),
                keep(r["text_before"]), keep(r["text_after"]), keep(_target(r["target"])), veil,
            )
        )  # fmt: skip
    out = [row for row in out if row[1] >= 0]
    out.sort(key=lambda row: (row[0], row[5] == row[6], row[1], row[3], row[4] or 0))
    first = next((index[k] for k in keys if any(row[0] == index[k] for row in out)), None)
    return {
        "rows": out,
        "texts": list(texts),
        "scenarios": list(scenarios),
        "outcomes": list(outcomes),
        "dims": list(DIMENSIONS),
        "first": first,
    }


def _short(score: float | None) -> float | None:
    return None if score is None else round(score, 4)


def _target(text: str | None) -> str | None:
    if not text or text == "{}":
        return None
    try:
        return "\n".join(
            f"{k}: {v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in json.loads(text).items()
        )
    except (ValueError, AttributeError):
        return text
