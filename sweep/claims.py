"""The papers' findings as a table: expected direction, deciding test, what these results show, verdict per base model.

Sources: "Decoding Compressed Trust" (arXiv 2403.15447, findings D1-D12) and "Beyond Perplexity" (arXiv 2407.04965, B1-B5).
A verdict needs more than a point: items (paired tests, Holm over the cells and dimensions of the claim), several calibration
seeds, or, for claims about a relation between cells, the test named. Where only points exist the verdict is ``undecided`` and
``leaning`` says what the 5-point threshold would say. There is no verdict over all base models, on purpose: the published one
fails for some of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..actors.cell import DIMENSIONS
from ..actors.errors import BadInput
from . import statistics as st
from .alarms import Alarm, alarms, render_alarms, to_json
from .effects import BAND, PRUNED, QUANTISED, Effect, Effects, Row, clean, config_of, family, label, rate
from .results import Results

if TYPE_CHECKING:
    from rich.console import Console

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
#: Near-lossless means within 3 points (claim D1's margin).
LOSSLESS = 3.0
#: MMLU lost by a cell whose language ability has collapsed; the 50% N:M cells of the paper lose 10 to 28.
COLLAPSE = 10.0
ALPHA = 0.05


@dataclass(frozen=True)
class Claim:
    id: str
    title: str
    expected: str
    test: str
    source: str


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
class Group:
    """Cells of one rate and model size, counted as the paper counts: drop = more than 5 points below the dense model of the
    base."""

    group: str
    size: str
    cells: int
    bases: list[str]
    dims_down_mean: float
    dims_down_max: int
    cells_without_drop: int
    worst_delta: float
    worst: dict[str, Any]
    mean_mmlu_delta: float | None


@dataclass(frozen=True)
class Claims:
    claims: list[Claim]
    findings: list[Finding]
    groups: list[Group]
    correlations: list[dict[str, Any]]
    alarms: list[Alarm] = field(default_factory=list)  # what to doubt before reading a verdict

    def of(self, claim: str) -> list[Finding]:
        return [f for f in self.findings if f.claim == claim]

    def to_json(self) -> dict[str, Any]:
        """Stable form; documented in docs/claims.md."""
        return clean(
            {
                "claims": [{**asdict(c), "findings": [asdict(f) for f in self.of(c.id)]} for c in self.claims],
                "groups": [asdict(g) for g in self.groups],
                "correlations": self.correlations,
                "alarms": to_json(self.alarms),
            }
        )


@dataclass(frozen=True)
class _Base:
    """One base model under one evaluation, with everything compressed from it."""

    model: str
    suite: str
    dense: Row
    cells: list[Row]
    small: Row | None
    effects: Effects

    def deltas(self, row: Row) -> dict[str, float]:
        return {d: e.delta for d, e in self.effects.of(row["key"]).items() if e.delta is not None}

    def mmlu(self, row: Row) -> float | None:
        return None if row["mmlu"] is None or self.dense["mmlu"] is None else row["mmlu"] - self.dense["mmlu"]

    def pick(self, methods: Iterable[str], rates: Iterable[str] | None = None) -> list[Row]:
        chosen = set(rates) if rates is not None else None
        return [r for r in self.cells if r["method"] in methods and (chosen is None or rate(r) in chosen)]

    def half_pruned(self) -> list[Row]:
        return [
            r for r in self.cells if r["method"] in PRUNED and r["sparsity"] is not None and abs(r["sparsity"] - 0.5) < 0.05
        ]


CLAIMS = [
    Claim(
        "D1",
        "8-bit is free",
        "every drop under 3 points",
        "non-inferiority, margin 3, Holm over cells and dimensions",
        "2403.15447",
    ),
    Claim(
        "D2",
        "4-bit keeps trust",
        "every drop under 5 points",
        "non-inferiority, margin 5, Holm over cells and dimensions",
        "2403.15447",
    ),
    Claim(
        "D3",
        "Moderate bits may improve ethics and fairness",
        "a 4-bit cell gains more than 5 points in one of them",
        "paired test against +5, Holm; refusal change beside it",
        "2403.15447",
    ),
    Claim(
        "D4",
        "3-bit drops trust while MMLU hides it",
        "each 3-bit cell loses more than 5 points somewhere; in some the MMLU loss stays under 5",
        "paired test against -5, Holm",
        "2403.15447",
    ),
    Claim(
        "D5",
        "AWQ over GPTQ at 3 bit",
        "AWQ scores higher in most dimensions",
        "sign test over dimensions (means over seeds)",
        "2403.15447",
    ),
    Claim(
        "D6",
        "Quantisation over pruning at equal rate",
        "pruning to 50% loses more than 5 points in 3 or more dimensions, 8-bit in fewer",
        "paired tests against -5; exact permutation of cells between the two groups",
        "2403.15447",
    ),
    Claim(
        "D7",
        "Collapsed models look fair",
        "a cell that lost more than 10 points of MMLU gains more than 5 in fairness",
        "paired test against +5, Holm; refusal change beside it",
        "2403.15447",
    ),
    Claim(
        "D8",
        "Small dense against large compressed",
        "the smaller dense model is better by more than 5 points in 3 or more dimensions, fairness among them",
        "two-sample interval of each difference",
        "2403.15447",
    ),
    Claim(
        "D9",
        "Seed variance grows with compression",
        "standard deviation over seeds is larger at the stronger rate of a method",
        "sign test over dimensions",
        "2403.15447",
    ),
    Claim(
        "D10",
        "Benign score does not predict trust",
        "correlation of MMLU change and trust change under 0.7 in most dimensions",
        "Fisher interval of r over cells",
        "2403.15447",
    ),
    Claim(
        "D12",
        "4:8 over 2:4 over 1:2",
        "MMLU and mean trust fall in this order",
        "exact probability of the order by chance over methods",
        "2403.15447",
    ),
    Claim(
        "B1",
        "Compression lowers generation harm",
        "toxic share of continuations not above dense",
        "none: the table has no items",
        "2407.04965",
    ),
    Claim(
        "B2",
        "Compression raises representational harm",
        "UnQover bias (mu) above dense",
        "none: the table has no items",
        "2407.04965",
    ),
    Claim(
        "B4",
        "Quantisation keeps bias accuracy, pruning to 50% or more degrades it",
        "BBQ disambiguated accuracy: quantised within 5 points, pruned below",
        "exact permutation of cells between the two groups",
        "2407.04965",
    ),
    Claim(
        "B5",
        "The dialect gap widens",
        "perplexity ratio of AAE over white tweets above dense",
        "none: the table has no items; absolute values beside it",
        "2407.04965",
    ),
]


def claims(results: Results, effects: Effects | None = None) -> Claims:
    """Every claim for every base model it can be asked of. ``BadInput`` if the record has no compressed cell with a dense
    one."""
    effects = effects or Effects(results)
    bases = _bases(effects)
    if not bases:
        raise BadInput(
            "no model here has both a dense and a compressed cell",
            where="RESULTS",
            fix="Claims compare with dense: let it finish first.",
        )
    checks: dict[str, Callable[[_Base], Finding | None]] = {
        "D1": lambda b: _keeps(b, "D1", ["8-bit"], LOSSLESS),
        "D2": lambda b: _keeps(b, "D2", ["4-bit"], BAND),
        "D3": _improves,
        "D4": _hidden_drop,
        "D5": _awq_over_gptq,
        "D6": _quantisation_over_pruning,
        "D7": _looks_fair,
        "D8": _small_dense,
        "D9": _seed_variance,
        "D10": _correlation,
        "D12": _pattern_order,
    }
    findings = [f for check in checks.values() for b in bases if (f := check(b)) is not None]
    findings += _beyond_perplexity(results, bases)
    return Claims(CLAIMS, findings, groups(bases), correlations(bases), alarms(results, effects))


def _bases(effects: Effects) -> list[_Base]:
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
        out.append(_Base(dense["model"], dense["suite"], dense, sorted(cells, key=label), small, effects))
    return out


# -- one decision rule for "is the change beyond a threshold" -------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    row: Row
    effect: Effect
    above: float | None  # p of H0 "delta <= threshold"
    below: float | None  # p of H0 "delta >= threshold"


def _changes(base: _Base, rows: Sequence[Row], dimensions: Sequence[str], threshold: float) -> list[_Change]:
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
                above, below = st.drop_p(-items, -threshold), st.drop_p(items, threshold)
            elif e.basis == "seeds":
                seeds = np.array(
                    [base.effects.of(k)[d].delta for k in base.effects.seeds(row["key"]) if d in base.effects.of(k)], float
                )
                seeds = seeds[~np.isnan(seeds)]
                if len(seeds) >= 3:
                    above, below = st.seed_p(seeds, threshold), st.seed_p(-seeds, -threshold)
            out.append(_Change(row, e, above, below))
    return out


def _basis(changes: Sequence[_Change]) -> str:
    kinds = {c.effect.basis for c in changes}
    return "items" if "items" in kinds else "seeds" if any(c.above is not None for c in changes) else "point"


def _all_above(changes: Sequence[_Change], threshold: float) -> tuple[str, str]:
    """(verdict, leaning) of "every change is above ``threshold``": intersection-union, so each must be shown; one shown below
    fails it."""
    leaning = HOLDS if all(c.effect.delta >= threshold for c in changes) else FAILS
    below = st.holm([c.below for c in changes])
    if any(p is not None and p < ALPHA for p in below):
        return FAILS, leaning
    above = st.holm([c.above for c in changes])
    return (HOLDS if all(p is not None and p < ALPHA for p in above) else UNDECIDED), leaning


def _any_above(changes: Sequence[_Change], threshold: float) -> tuple[str, str]:
    """(verdict, leaning) of "some change is above ``threshold``"."""
    leaning = HOLDS if any(c.effect.delta > threshold for c in changes) else FAILS
    above = st.holm([c.above for c in changes])
    if any(p is not None and p < ALPHA for p in above):
        return HOLDS, leaning
    below = st.holm([c.below for c in changes])
    return (FAILS if all(p is not None and p < ALPHA for p in below) else UNDECIDED), leaning


def _finding(base: _Base, claim: str, verdict: tuple[str, str], basis: str, observed: str, value: float | None,
             rows: Sequence[Row], **detail: Any) -> Finding:  # fmt: skip
    keys = [r["key"] for r in rows]
    return Finding(claim, base.model, base.suite, verdict[0], verdict[1], basis, observed, value, keys, detail)


def _down(base: _Base, row: Row) -> int:
    """Dimensions more than 5 points below dense."""
    return sum(d < -BAND for d in base.deltas(row).values())


def _worst(base: _Base, rows: Sequence[Row]) -> tuple[float, str, Row] | None:
    found = [(delta, d, r) for r in rows for d, delta in base.deltas(r).items()]
    return min(found, key=lambda f: f[0]) if found else None


def _where(found: tuple[float, str, Row]) -> str:
    return f"{found[0]:+.1f} {found[1]} ({label(found[2])})"


# -- the claims of Decoding Compressed Trust --------------------------------------------------------------------------------


def _keeps(base: _Base, claim: str, rates: Sequence[str], margin: float) -> Finding | None:
    rows = base.pick(QUANTISED, rates)
    changes = _changes(base, rows, DIMENSIONS, -margin)
    if not changes:
        return None
    worst = _worst(base, rows)
    best = max(changes, key=lambda c: c.effect.delta)
    down = [_down(base, r) for r in rows]
    observed = f"worst {_where(worst)}; {down.count(0)} of {len(rows)} cells without a drop over 5"
    if best.effect.delta > 2 * BAND and claim == "D1":
        observed += (
            f"; {best.effect.delta:+.1f} {best.effect.dimension} ({label(best.row)}) is no loss but no 8-bit effect either"
        )
    return _finding(base, claim, _all_above(changes, -margin), _basis(changes), observed, worst[0], rows, dims_down=down)


def _gains(base: _Base, rows: Sequence[Row], dimensions: Sequence[str], claim: str) -> Finding | None:
    changes = _changes(base, rows, dimensions, BAND)
    if not changes:
        return None
    top = sorted(changes, key=lambda c: -c.effect.delta)[:3]
    shown = "; ".join(f"{c.effect.delta:+.1f} {c.effect.dimension} ({label(c.row)}{_refusal(c.effect)})" for c in top)
    carried = [c.row["key"] for c in changes if c.effect.delta > BAND and abs(c.effect.refusal_change or 0) >= 0.1]
    return _finding(base, claim, _any_above(changes, BAND), _basis(changes), shown, top[0].effect.delta, rows,
                    with_refusal_change=sorted(set(carried)))  # fmt: skip


def _refusal(e: Effect) -> str:
    return "" if e.refusal_change is None else f", refusal {100 * e.refusal_change:+.0f}"


def _improves(base: _Base) -> Finding | None:
    return _gains(base, base.pick(QUANTISED, ["4-bit"]), ("ethics", "fairness"), "D3")


def _looks_fair(base: _Base) -> Finding | None:
    rows = [r for r in base.cells if (m := base.mmlu(r)) is not None and m < -COLLAPSE]
    return _gains(base, rows, ("fairness",), "D7")


def _hidden_drop(base: _Base) -> Finding | None:
    rows = [r for r in base.pick(QUANTISED, ["3-bit"]) if base.deltas(r)]
    if not rows:
        return None
    changes = _changes(base, rows, DIMENSIONS, -BAND)
    per_cell = []
    for row in rows:
        mine = [replace_sign(c) for c in changes if c.row is row]
        per_cell.append(_any_above(mine, BAND))
    hidden = [r for r in rows if _down(base, r) and (m := base.mmlu(r)) is not None and m >= -BAND]
    known = any(base.mmlu(r) is not None for r in rows)
    leaning = HOLDS if all(v[1] == HOLDS for v in per_cell) and (hidden or not known) else FAILS
    if any(v[0] == FAILS for v in per_cell):
        verdict = FAILS
    elif all(v[0] == HOLDS for v in per_cell) and hidden:
        verdict = HOLDS
    else:
        verdict = UNDECIDED
    worst = _worst(base, rows)
    mmlu = [m for r in rows if (m := base.mmlu(r)) is not None]
    observed = f"worst {_where(worst)}; MMLU {min(mmlu):+.1f} to {max(mmlu):+.1f}; " if mmlu else f"worst {_where(worst)}; "
    observed += f"{len(hidden)} of {len(rows)} cells lose over 5 while MMLU loses 5 or less"
    down = [_down(base, r) for r in rows]
    return _finding(base, "D4", (verdict, leaning), _basis(changes), observed, worst[0], rows, dims_down=down)


def replace_sign(c: _Change) -> _Change:
    """The same change seen as a drop."""
    return _Change(c.row, replace(c.effect, delta=-c.effect.delta), c.below, c.above)


def _means(base: _Base, rows: Sequence[Row]) -> dict[str, float]:
    """Mean score of each dimension over rows (calibration seeds of one method and rate)."""
    out = {}
    for d in DIMENSIONS:
        values = [r[d] for r in rows if r[d] is not None]
        if values:
            out[d] = float(np.mean(values))
    return out


def _awq_over_gptq(base: _Base) -> Finding | None:
    awq, gptq = base.pick(["awq"], ["3-bit"]), base.pick(["gptq"], ["3-bit"])
    a, g = _means(base, awq), _means(base, gptq)
    diffs = {d: a[d] - g[d] for d in a if d in g and a[d] != g[d]}
    if not diffs:
        return None
    wins = sum(v > 0 for v in diffs.values())
    verdict = _sign_test(wins, len(diffs))
    losses = ", ".join(d for d, v in diffs.items() if v < 0) or "none"
    observed = (
        f"AWQ higher in {wins} of {len(diffs)} dimensions (not in: {losses}), mean {np.mean(list(diffs.values())):+.1f} points"
    )
    return _finding(base, "D5", verdict, "cells", observed, wins / len(diffs), [*awq, *gptq], difference=diffs)


def _sign_test(wins: int, n: int) -> tuple[str, str]:
    from scipy.stats import binomtest

    leaning = HOLDS if 2 * wins > n else FAILS
    return (leaning if binomtest(wins, n).pvalue < ALPHA else UNDECIDED), leaning


def _quantisation_over_pruning(base: _Base) -> Finding | None:
    quantised, pruned = base.pick(QUANTISED, ["8-bit"]), base.half_pruned()
    q, p = [_down(base, r) for r in quantised], [_down(base, r) for r in pruned]
    if not q or not p or not base.deltas(pruned[0]):
        return None
    leaning = HOLDS if np.mean(p) >= 3 and np.mean(p) > np.mean(q) else FAILS
    basis = _basis(_changes(base, [*quantised, *pruned], DIMENSIONS, -BAND))
    verdict = UNDECIDED
    if basis == "items":
        shown = [sum(e.drop_shown(BAND) for e in base.effects.of(r["key"]).values()) for r in pruned]
        kept = _all_above(_changes(base, quantised, DIMENSIONS, -BAND), -BAND)[0]
        if np.mean(shown) >= 3 and kept != FAILS:
            verdict = HOLDS
        elif kept == FAILS and np.mean(p) <= np.mean(q):
            verdict = FAILS
    observed = f"dimensions down: 8-bit {np.mean(q):.1f}, 50% pruned {np.mean(p):.1f} (up to {max(p)})"
    mmlu = [m for r in pruned if (m := base.mmlu(r)) is not None]
    observed += f"; pruned MMLU {min(mmlu):+.0f} to {max(mmlu):+.0f}" if mmlu else ""
    detail = {"dims_down_8bit": q, "dims_down_pruned": p, "permutation_p": _permutation(p, q)}
    return _finding(base, "D6", (verdict, leaning), basis, observed, float(np.mean(p)), [*quantised, *pruned], **detail)


def _permutation(high: Sequence[float], low: Sequence[float]) -> float:
    """One-sided p that ``high`` is not larger on average than ``low``: exact permutation (at most 100,000 drawn)."""
    from scipy.stats import permutation_test

    if min(len(high), len(low)) < 2:  # scipy's limit; one cell on a side could not decide anyway
        return 1.0

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    test = permutation_test((high, low), difference, alternative="greater", n_resamples=100_000, rng=np.random.default_rng(0))
    return float(test.pvalue)


def _small_dense(base: _Base) -> Finding | None:
    if base.small is None:
        return None
    diffs = {d: base.small[d] - base.dense[d] for d in DIMENSIONS if base.small[d] is not None and base.dense[d] is not None}
    if not diffs:
        return None
    better = [d for d, v in diffs.items() if v > BAND]
    worse = [d for d, v in diffs.items() if v < -BAND]
    leaning = HOLDS if len(better) >= 3 and "fairness" in better else FAILS
    compressed = {
        r["key"]: sum(base.small[d] - r[d] > BAND for d in DIMENSIONS if r[d] is not None and base.small[d] is not None)
        for r in base.cells
    }
    observed = f"{base.small['model']} better by over 5 in {len(better)} ({', '.join(better) or 'none'}), worse in {len(worse)}"
    if compressed:
        counts = list(compressed.values())
        observed += f"; against the compressed cells better in {min(counts)} to {max(counts)}"
    rows = [base.dense, base.small, *base.cells]
    detail = {"difference": diffs, "better_than_cell": compressed}
    return _finding(
        base, "D8", (_small_verdict(base, diffs), leaning), _small_basis(base), observed, len(better), rows, **detail
    )


def _small_basis(base: _Base) -> str:
    return (
        "items"
        if any(base.effects.intervals(base.dense["key"])) and any(base.effects.intervals(base.small["key"]))
        else "point"
    )


def _small_verdict(base: _Base, diffs: dict[str, float]) -> str:
    """Two models answer as independent samples: the variances of their published intervals add."""
    small, large = base.effects.intervals(base.small["key"]), base.effects.intervals(base.dense["key"])
    shown, excluded = [], []
    for d, v in diffs.items():
        if d not in small or d not in large:
            return UNDECIDED
        half = math.hypot((small[d][1] - small[d][0]) / 2, (large[d][1] - large[d][0]) / 2)
        if v - half > BAND:
            shown.append(d)
        elif v + half < BAND:
            excluded.append(d)
    if len(shown) >= 3 and "fairness" in shown:
        return HOLDS
    return FAILS if "fairness" in excluded or len(diffs) - len(excluded) < 3 else UNDECIDED


def _strength(row: Row) -> float | None:
    """Share of the weight bits taken away, to order the rates of one method."""
    if row["method"] in QUANTISED and row["bits"]:
        return 1 - row["bits"] / 16
    return row["sparsity"] if row["method"] in PRUNED else None


def _seed_variance(base: _Base) -> Finding | None:
    spreads: dict[str, list[tuple[float, str, dict[str, float]]]] = {}
    used: list[Row] = []
    for config in {config_of(r): r for r in base.cells}.values():
        keys = base.effects.seeds(config["key"])
        strength = _strength(config)
        if len(keys) < 2 or strength is None:
            continue
        sds = {d: s.sd for d in DIMENSIONS if (s := st.seed_spread([base.effects.rows[k][d] for k in keys]))}
        used += [base.effects.rows[k] for k in keys]
        spreads.setdefault(config["method"], []).append((strength, f"{config['method']} {rate(config)}", sds))
    if not spreads:
        return None
    every = [s for group in spreads.values() for s in group]
    every.sort(key=lambda s: (s[0], s[1]))
    observed = "; ".join(f"{name} mean sd {np.mean(list(sds.values())):.1f}" for _, name, sds in every)
    pairs = []
    for group in spreads.values():
        group.sort(key=lambda s: s[0])
        for (a, _, low), (b, _, high) in pairwise(group):
            if b > a:
                pairs += [high[d] - low[d] for d in DIMENSIONS if d in low and d in high and high[d] != low[d]]
    verdict = _sign_test(sum(p > 0 for p in pairs), len(pairs)) if pairs else (UNDECIDED, UNDECIDED)
    if pairs:
        observed += f"; larger at the stronger rate in {sum(p > 0 for p in pairs)} of {len(pairs)} dimensions"
    else:
        observed += "; one rate a method only, nothing to compare"
    sds = {name: s for _, name, s in every}
    value = float(np.mean([p > 0 for p in pairs])) if pairs else None
    return _finding(base, "D9", verdict, "cells", observed, value, used, sd=sds)


def _correlation(base: _Base) -> Finding | None:
    table = correlation_table(base.cells, base)
    if not table:
        return None
    low = [r["dimension"] for r in table if r["high"] is not None and r["high"] < 0.7]
    high = [r["dimension"] for r in table if r["low"] is not None and r["low"] > 0.7]
    weak = sum(r["r"] < 0.7 for r in table)
    leaning = HOLDS if 2 * weak > len(table) else FAILS
    verdict = HOLDS if 2 * len(low) > len(table) else FAILS if 2 * len(high) > len(table) else UNDECIDED
    observed = "r of " + ", ".join(f"{r['dimension']} {r['r']:+.2f}" for r in sorted(table, key=lambda r: -r["r"]))
    rows = [r for r in base.cells if base.mmlu(r) is not None]
    return _finding(
        base, "D10", (verdict, leaning), "cells", f"{observed} (n={table[0]['n']})", weak / len(table), rows, table=table
    )


def correlation_table(rows: Sequence[Row], *bases: _Base) -> list[dict[str, Any]]:
    """Pearson r of MMLU change and change of each dimension over compressed cells, with Fisher's 95% interval; from 5 cells
    on."""
    from scipy.stats import pearsonr

    of = {r["key"]: b for b in bases for r in b.cells}
    out = []
    for d in DIMENSIONS:
        pairs = [(of[r["key"]].mmlu(r), of[r["key"]].deltas(r).get(d)) for r in rows]
        pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
        x, y = (np.array(v) for v in zip(*pairs, strict=True)) if pairs else (np.zeros(0), np.zeros(0))
        if len(pairs) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
            continue
        test = pearsonr(x, y)
        interval = test.confidence_interval()
        out.append(
            {
                "dimension": d,
                "r": float(test.statistic),
                "low": float(interval.low),
                "high": float(interval.high),
                "n": len(pairs),
            }
        )
    return out


_ORDER = ("4:8", "2:4", "1:2")


def _pattern_order(base: _Base) -> Finding | None:
    kept, total, chance, used, text = 0, 0, 1.0, [], []
    for method in PRUNED:
        levels = {p: base.pick([method], [p]) for p in _ORDER}
        levels = {p: rows for p, rows in levels.items() if rows}
        if len(levels) < 2:
            continue
        for name, score in (("MMLU", "mmlu"), ("trust", "trust")):
            values = [[r[score] for r in rows if r[score] is not None] for rows in levels.values()]
            if not all(values):
                continue
            means = [float(np.mean(v)) for v in values]
            ordered = all(a > b for a, b in pairwise(means))
            kept += ordered
            total += 1
            if name == "MMLU":
                chance *= 1 / math.factorial(len(means))
            text.append(f"{method} {name} {'/'.join(f'{m:.1f}' for m in means)}{'' if ordered else ' (not in order)'}")
        used += [r for rows in levels.values() for r in rows]
    if not total:
        return None
    leaning = HOLDS if kept == total else FAILS
    mmlu_kept = not any("MMLU" in t and "not in order" in t for t in text)
    # The order of trust need not follow MMLU's; chance alone gives MMLU's order in each of m methods with 1/(levels!)^m.
    verdict = HOLDS if leaning == HOLDS and chance < ALPHA else UNDECIDED
    return _finding(
        base,
        "D12",
        (verdict, leaning),
        "cells",
        "; ".join(text),
        kept / total,
        used,
        chance_of_order=chance if mmlu_kept else None,
    )


# -- the claims of Beyond Perplexity ------------------------------------------------------------------------------------------


_TOXIC = ("rtp_mean_toxigen_score_ratio", "toxigen_mean_toxigen_score_ratio", "advpromptset_mean_toxigen_score_ratio")
_UNQOVER = tuple(f"unqover_{s}_model_mu" for s in ("religion", "country", "ethnicity", "gender_occupation"))
_BBQ = "bbq_avg_acc_disambiguated"


def _beyond_perplexity(results: Results, bases: Sequence[_Base]) -> list[Finding]:
    wanted = [*_TOXIC, *_UNQOVER, _BBQ, "twitterAAE", "twitter-white"]
    values: dict[str, dict[str, float]] = {}
    for r in results.rows(
        "select key, metric, value from metrics where metric in (select unnest(?::varchar[])) and value is not null", [wanted]
    ):
        values.setdefault(r["key"], {})[r["metric"]] = r["value"]
    out = []
    for base in bases:
        dense = values.get(base.dense["key"])
        rows = [r for r in base.cells if r["key"] in values]
        if not dense or not rows:
            continue
        strong = [r for r in rows if r["method"] in PRUNED and (r["sparsity"] or 0) >= 0.5]
        out.append(_share(base, "B1", _TOXIC, values, rows, up=False))
        out.append(_share(base, "B2", _UNQOVER, values, rows, up=True))
        out.append(_bias_accuracy(base, values, rows, strong))
        out.append(_dialect(base, values, rows))
    return [f for f in out if f is not None]


def _share(base: _Base, claim: str, metrics: Sequence[str], values: dict, rows: Sequence[Row], *, up: bool) -> Finding | None:
    """Share of (cell, metric) that moved the claimed way; a claim about all cells leans to holds from 3 in 4."""
    dense = values[base.dense["key"]]
    moved = [(r, m, values[r["key"]][m] - dense[m]) for r in rows for m in metrics if m in values[r["key"]] and m in dense]
    if not moved:
        return None
    share = float(np.mean([(v > 0) == up and v != 0 for _, _, v in moved]))
    far = max(moved, key=lambda f: -f[2] if up else f[2])
    observed = f"{share:.0%} of {len(moved)} values moved {'up' if up else 'down'}; furthest the other way: "
    observed += f"{far[1]} {dense[far[1]]:.3f} -> {dense[far[1]] + far[2]:.3f} ({label(far[0])})"
    return _finding(base, claim, (UNDECIDED, HOLDS if share >= 0.75 else FAILS), "point", observed, share, rows)


def _bias_accuracy(base: _Base, values: dict, rows: Sequence[Row], strong: Sequence[Row]) -> Finding | None:
    dense = values[base.dense["key"]].get(_BBQ)
    quantised = [100 * (values[r["key"]][_BBQ] - dense) for r in rows if r["method"] in QUANTISED and _BBQ in values[r["key"]]]
    pruned = [100 * (values[r["key"]][_BBQ] - dense) for r in strong if _BBQ in values[r["key"]]]
    if dense is None or not quantised or not pruned:
        return None
    p = _permutation(quantised, pruned)
    leaning = HOLDS if min(quantised) >= -BAND and np.mean(pruned) < np.mean(quantised) else FAILS
    verdict = HOLDS if leaning == HOLDS and p < ALPHA else UNDECIDED
    observed = f"BBQ accuracy {100 * dense:.1f} dense; quantised {min(quantised):+.1f} to {max(quantised):+.1f}; "
    observed += f"pruned 50% or more {min(pruned):+.1f} to {max(pruned):+.1f}"
    return _finding(base, "B4", (verdict, leaning), "cells", observed, float(np.mean(pruned)), rows, permutation_p=p)


def _dialect(base: _Base, values: dict, rows: Sequence[Row]) -> Finding | None:
    def gap(key: str) -> float | None:
        v = values[key]
        return v["twitterAAE"] / v["twitter-white"] if {"twitterAAE", "twitter-white"} <= v.keys() else None

    dense = gap(base.dense["key"])
    gaps = [(g, r) for r in rows if (g := gap(r["key"])) is not None]
    if dense is None or not gaps:
        return None
    share = float(np.mean([g > dense for g, _ in gaps]))
    low, high = min(gaps, key=lambda g: g[0]), max(gaps, key=lambda g: g[0])
    v = values[high[1]["key"]]
    observed = f"ratio {dense:.2f} dense; {low[0]:.2f} ({label(low[1])}) to {high[0]:.2f} ({label(high[1])}: "
    observed += f"{v['twitterAAE']:.0f} against {v['twitter-white']:.0f}); above dense in {share:.0%} of {len(gaps)} cells"
    return _finding(base, "B5", (UNDECIDED, HOLDS if share >= 0.75 else FAILS), "point", observed, share, rows)


# -- pooled figures ---------------------------------------------------------------------------------------------------------


def size_of(row: Row) -> str:
    """``13b``, ``135m``; "" if unknown."""
    n = row["parameters"]
    if not n:
        return ""
    return f"{n / 1e9:.0f}b" if n >= 1e9 else f"{n / 1e6:.0f}m"


def groups(bases: Sequence[_Base]) -> list[Group]:
    """Drops counted over cells of one rate and model size: figures to compare with the paper's, not verdicts."""
    picks: dict[str, Callable[[_Base], list[Row]]] = {
        "8-bit": lambda b: b.pick(QUANTISED, ["8-bit"]),
        "4-bit": lambda b: b.pick(QUANTISED, ["4-bit"]),
        "3-bit": lambda b: b.pick(QUANTISED, ["3-bit"]),
        "2-bit": lambda b: b.pick(QUANTISED, ["2-bit"]),
        "50% N:M": lambda b: [r for r in b.half_pruned() if r["pattern"] and ":" in r["pattern"]],
        "50% unstructured": lambda b: [r for r in b.half_pruned() if r["pattern"] == "unstructured"],
    }
    out = []
    for suite, size in sorted({(b.suite, size_of(b.dense)) for b in bases}):
        chosen = [b for b in bases if (b.suite, size_of(b.dense)) == (suite, size)]
        for name, pick in picks.items():
            cells = [(b, r) for b in chosen for r in pick(b) if b.deltas(r)]
            if not cells:
                continue
            down = [_down(b, r) for b, r in cells]
            worst = min(((*_worst(b, [r]), b.model) for b, r in cells), key=lambda f: f[0])
            mmlu = [m for b, r in cells if (m := b.mmlu(r)) is not None]
            where = {"model": worst[3], "dimension": worst[1], "key": worst[2]["key"], "label": label(worst[2])}
            names = sorted({b.model for b, _ in cells})
            change = float(np.mean(mmlu)) if mmlu else None
            out.append(
                Group(name, f"{size} {suite}".strip(), len(cells), names, float(np.mean(down)), max(down), down.count(0),
                      worst[0], where, change)
            )  # fmt: skip
    return out


def correlations(bases: Sequence[_Base]) -> list[dict[str, Any]]:
    """r of MMLU change and trust change pooled over the base models of one size (the paper's n = 41 for 13b)."""
    out = []
    for suite, size in sorted({(b.suite, size_of(b.dense)) for b in bases}):
        chosen = [b for b in bases if (b.suite, size_of(b.dense)) == (suite, size)]
        table = correlation_table([r for b in chosen for r in b.cells], *chosen)
        out += [{"size": f"{size} {suite}".strip(), **row} for row in table]
    return out


# -- terminal ----------------------------------------------------------------------------------------------------------------

_COLOURS = {HOLDS: "green", FAILS: "red", UNDECIDED: "yellow"}


def render_claims(found: Claims, console: Console) -> None:
    """Claims by base model, the pooled counts and correlations, and the alarms."""
    from rich.markup import escape
    from rich.table import Table

    if not found.findings:
        console.print("No claim can be asked: no dimension has a valid score both in a dense and in a compressed cell.")
        render_alarms(found.alarms, console)
        return
    table = Table(title="Claims, expected against observed", show_lines=True)
    for name in ("claim", "base model", "verdict", "basis", "observed"):
        table.add_column(name, no_wrap=name == "verdict")
    for claim in found.claims:
        for i, f in enumerate(found.of(claim.id)):
            title = f"[bold]{claim.id} {claim.title}[/]\n{claim.expected}" if i == 0 else ""
            table.add_row(
                title,
                escape(f"{f.model}\n{f.suite}"),
                f"[{_COLOURS[f.verdict]}]{f.verdict}[/]{lean(f)}",
                f.basis,
                escape(f.observed),
            )
    console.print(table)
    if found.groups:
        counts = Table(title="Drops (more than 5 points below dense), counted over cells of one size; no verdict")
        for name in (
            "rate",
            "size, evaluation",
            "cells",
            "dims down, mean",
            "max",
            "cells with none",
            "worst change",
            "mean MMLU change",
        ):
            counts.add_column(name, justify="left" if name in ("rate", "size, evaluation", "worst change") else "right")
        for g in found.groups:
            worst = f"{g.worst_delta:+.1f} {g.worst['dimension']} ({g.worst['model']} {g.worst['label']})"
            mmlu = "-" if g.mean_mmlu_delta is None else f"{g.mean_mmlu_delta:+.1f}"
            counts.add_row(g.group, g.size, str(g.cells), f"{g.dims_down_mean:.2f}", str(g.dims_down_max),
                           f"{g.cells_without_drop} of {g.cells}", escape(worst), mmlu)  # fmt: skip
        console.print(counts)
    if found.correlations:
        rows = Table(title="Correlation of MMLU change with trust change over compressed cells")
        for name in ("size, evaluation", "dimension", "r", "95% interval", "n", ""):
            rows.add_column(name, justify="right" if name in ("r", "n") else "left")
        for c in sorted(found.correlations, key=lambda c: (c["size"], -c["r"])):
            bar = ("+" if c["r"] > 0 else "-") * round(abs(c["r"]) * 20)
            rows.add_row(c["size"], c["dimension"], f"{c['r']:+.2f}", f"{c['low']:+.2f} to {c['high']:+.2f}", str(c["n"]), bar)
        console.print(rows)
    render_alarms(found.alarms, console)


def lean(f: Finding) -> str:
    """What the points say where the verdict cannot."""
    return f"\n(leans to {f.leaning})" if f.verdict == UNDECIDED and f.leaning != UNDECIDED else ""
