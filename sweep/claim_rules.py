"""One base model, its compressed cells, and the decision rule of claims: is a change beyond a threshold, shown or only seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..actors.cell import DIMENSIONS
from . import statistics as st
from .effects import PRUNED, Effect, Effects, Row, family, label, rate
from .names import asked

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
#: Near-lossless means within 3 points (claim D1's margin).
LOSSLESS = 3.0
#: MMLU lost by a cell whose language ability has collapsed; the 50% N:M cells of the paper lose 10 to 28.
COLLAPSE = 10.0
ALPHA = 0.05


@dataclass(frozen=True)
class Finding:
    """One claim for one base model (and evaluation: suites are never mixed)."""

    claim: str
    model: str
    suite: str
    verdict: str
    leaning: str
    basis: str  # items, seeds, cells (a relation between cells) or point
    observed: str
    value: float | None
    cells: list[str]
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """One base model under one evaluation, with everything compressed from it."""

    model: str
    suite: str
    dense: Row
    cells: list[Row]
    small: Row | None
    effects: Effects

    def deltas(self, row: Row) -> dict[str, float]:
        return {d: e.delta for d, e in self.effects.of(row["key"]).items() if e.delta is not None}

    def told(self, rows: Iterable[Row]) -> list[Row]:
        """Those with a change or a score lost to silence: a cell of which no score is left belongs to every count of drops."""
        return [r for r in rows if any(e.told for e in self.effects.of(r["key"]).values())]

    def mmlu(self, row: Row) -> float | None:
        return None if row["mmlu"] is None or self.dense["mmlu"] is None else round(row["mmlu"] - self.dense["mmlu"], 9)

    def pick(self, methods: Iterable[str], rates: Iterable[str] | None = None) -> list[Row]:
        chosen = set(rates) if rates is not None else None
        return [r for r in self.cells if r["method"] in methods and (chosen is None or rate(r) in chosen)]

    def half_pruned(self) -> list[Row]:
        return [
            r for r in self.cells if r["method"] in PRUNED and r["sparsity"] is not None and abs(r["sparsity"] - 0.5) < 0.05
        ]


def bases_of(effects: Effects) -> list[Base]:
    out = []
    dense_rows = [r for r in effects.rows.values() if r["method"] == "dense"]
    for dense in sorted(dense_rows, key=lambda r: (r["suite"], r["model"], r["key"])):
        cells = [r for r in effects.rows.values() if r["dense_key"] == dense["key"] and r["method"] != "dense"]
        if not cells:
            continue
        smaller = [
            d
            for d in dense_rows
            if d["evaluation"] == dense["evaluation"]
            and d["parameters"]
            and dense["parameters"]
            and d["parameters"] < dense["parameters"]
            and family(d["model"]) == family(dense["model"])
        ]
        small = max(smaller, key=lambda d: d["parameters"], default=None)
        out.append(Base(dense["model"], dense["suite"], dense, sorted(cells, key=label), small, effects))
    names = asked([b.dense for b in out])
    return [replace(b, suite=name) for b, name in zip(out, names, strict=True)]


# -- one decision rule for "is the change beyond a threshold" -------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    row: Row
    effect: Effect
    above: float | None  # p of H0 "delta <= threshold"
    below: float | None  # p of H0 "delta >= threshold"


def changes_of(base: Base, rows: Sequence[Row], dimensions: Sequence[str], threshold: float) -> list[Change]:
    """Change of each cell and dimension against ``threshold`` points, with one-sided p-values where items or seeds allow
    them."""
    out = []
    for row in rows:
        for d, e in base.effects.of(row["key"]).items():
            if d not in dimensions or e.delta is None:
                continue
            above = below = None
            items = base.effects.contributions.get((row["key"], d))
            if items is not None:
                above = max(st.drop_p(-d, -threshold) for d in items)
                below = max(st.drop_p(d, threshold) for d in items)
            elif e.basis == "seeds":
                seeds = np.array(
                    [base.effects.of(k)[d].delta for k in base.effects.seeds(row["key"]) if d in base.effects.of(k)], float
                )
                seeds = seeds[~np.isnan(seeds)]
                if len(seeds) >= 3:
                    above, below = st.seed_p(seeds, threshold), st.seed_p(-seeds, -threshold)
            out.append(Change(row, e, above, below))
    return out


def basis_of(changes: Sequence[Change]) -> str:
    kinds = {c.effect.basis for c in changes}
    return "items" if "items" in kinds else "seeds" if any(c.above is not None for c in changes) else "point"


def all_above(changes: Sequence[Change], threshold: float) -> tuple[str, str]:
    """(verdict, leaning) of "every change is above ``threshold``": intersection-union, so each must be shown; one shown below
    fails it."""
    leaning = HOLDS if all(c.effect.delta >= threshold for c in changes) else FAILS
    below = st.holm([c.below for c in changes])
    if any(p is not None and p < ALPHA for p in below):
        return FAILS, leaning
    above = st.holm([c.above for c in changes])
    return (HOLDS if all(p is not None and p < ALPHA for p in above) else UNDECIDED), leaning


def any_above(changes: Sequence[Change], threshold: float) -> tuple[str, str]:
    """(verdict, leaning) of "some change is above ``threshold``"."""
    leaning = HOLDS if any(c.effect.delta > threshold for c in changes) else FAILS
    above = st.holm([c.above for c in changes])
    if any(p is not None and p < ALPHA for p in above):
        return HOLDS, leaning
    below = st.holm([c.below for c in changes])
    return (FAILS if all(p is not None and p < ALPHA for p in below) else UNDECIDED), leaning


def conclude(base: Base, claim: str, verdict: tuple[str, str], basis: str, observed: str, value: float | None,
             rows: Sequence[Row], **detail: Any) -> Finding:  # fmt: skip
    keys = [r["key"] for r in rows]
    return Finding(claim, base.model, base.suite, verdict[0], verdict[1], basis, observed, value, keys, detail)


def down_count(base: Base, row: Row) -> int:
    """Dimensions more than 5 points below dense, or silent where the dense model answers."""
    return sum(e.down for e in base.effects.of(row["key"]).values())


def silenced(base: Base, rows: Iterable[Row]) -> int:
    """Scores (cell, dimension) that the dense model has and the cell lost to silence."""
    return sum(e.silenced for r in rows for e in base.effects.of(r["key"]).values())


def silence_note(base: Base, rows: Iterable[Row]) -> str:
    lost = silenced(base, rows)
    return f"; {lost} {'score' if lost == 1 else 'scores'} lost to silence" if lost else ""


def worst_of(base: Base, rows: Sequence[Row]) -> tuple[float, str, Row] | None:
    found = [(delta, d, r) for r in rows for d, delta in base.deltas(r).items()]
    return min(found, key=lambda f: f[0]) if found else None


def worst_text(found: tuple[float, str, Row] | None) -> str:
    return f"worst {found[0]:+.1f} {found[1]} ({label(found[2])})" if found else "no score left"


def as_drop(c: Change) -> Change:
    """The same change seen as a drop."""
    return Change(c.row, replace(c.effect, delta=-c.effect.delta), c.below, c.above)


def means_of(rows: Sequence[Row]) -> dict[str, float]:
    """Mean score of each dimension over rows (calibration seeds of one method and rate)."""
    out = {}
    for d in DIMENSIONS:
        values = [r[d] for r in rows if r[d] is not None]
        if values:
            out[d] = round(float(np.mean(values)), 9)  # means of equal scores are equal
    return out
