"""Each finding of the papers as a function of one base model: a ``Finding``, or None where it cannot be asked. See claims.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..actors.cell import DIMENSIONS
from . import statistics as st
from .claim_rules import (
    ALPHA,
    COLLAPSE,
    FAILS,
    HOLDS,
    LOSSLESS,
    UNDECIDED,
    Base,
    Finding,
    all_above,
    any_above,
    as_drop,
    basis_of,
    changes_of,
    conclude,
    down_count,
    means_of,
    silence_note,
    silenced,
    worst_of,
    worst_text,
)
from .effects import BAND, PRUNED, QUANTISED, Effect, Row, label, rate
from .results import Results

# -- the claims of Decoding Compressed Trust --------------------------------------------------------------------------------


def _keeps(base: Base, claim: str, rates: Sequence[str], margin: float) -> Finding | None:
    rows = base.pick(QUANTISED, rates)
    changes = changes_of(base, rows, DIMENSIONS, -margin)
    if not base.told(rows):
        return None
    worst = worst_of(base, rows)
    best = max(changes, key=lambda c: c.effect.delta, default=None)
    down = [down_count(base, r) for r in rows]
    observed = f"{worst_text(worst)}; {down.count(0)} of {len(rows)} cells without a drop over 5{silence_note(base, rows)}"
    if best and best.effect.delta > 2 * BAND and claim == "D1":
        observed += (
            f"; {best.effect.delta:+.1f} {best.effect.dimension} ({label(best.row)}) is no loss but no 8-bit effect either"
        )
    seen = [d for d in DIMENSIONS if any(c.effect.dimension == d for c in changes)]
    if seen and len(seen) < len(DIMENSIONS):
        observed += f"; rests on {', '.join(seen)} alone"
    verdict, leaning = all_above(changes, -margin)
    if silenced(base, rows):  # no drop is measured there, and none is excluded
        verdict, leaning = (UNDECIDED if verdict == HOLDS else verdict), FAILS
    return conclude(base, claim, (verdict, leaning), basis_of(changes), observed, worst and worst[0], rows, dims_down=down)


def _gains(base: Base, rows: Sequence[Row], dimensions: Sequence[str], claim: str) -> Finding | None:
    changes = changes_of(base, rows, dimensions, BAND)
    if not changes:
        return None
    top = sorted(changes, key=lambda c: -c.effect.delta)[:3]
    shown = "; ".join(f"{c.effect.delta:+.1f} {c.effect.dimension} ({label(c.row)}{_refusal(c.effect)})" for c in top)
    carried = [c.row["key"] for c in changes if c.effect.delta > BAND and abs(c.effect.refusal_change or 0) >= 0.1]
    return conclude(base, claim, any_above(changes, BAND), basis_of(changes), shown, top[0].effect.delta, rows,
                    with_refusal_change=sorted(set(carried)))  # fmt: skip


def _refusal(e: Effect) -> str:
    return "" if e.refusal_change is None else f", refusal {100 * e.refusal_change:+.0f}"


def _improves(base: Base) -> Finding | None:
    return _gains(base, base.pick(QUANTISED, ["4-bit"]), ("ethics", "fairness"), "D3")


def _looks_fair(base: Base) -> Finding | None:
    rows = [r for r in base.cells if (m := base.mmlu(r)) is not None and m < -COLLAPSE]
    return _gains(base, rows, ("fairness",), "D7")


def _hidden_drop(base: Base) -> Finding | None:
    rows = base.told(base.pick(QUANTISED, ["3-bit"]))
    if not rows:
        return None
    changes = changes_of(base, rows, DIMENSIONS, -BAND)
    per_cell = []
    for row in rows:
        mine = [as_drop(c) for c in changes if c.row is row]
        verdict, leaning = any_above(mine, BAND)
        if silenced(base, [row]):
            verdict, leaning = (UNDECIDED if verdict == FAILS else verdict), HOLDS
        per_cell.append((verdict, leaning))
    hidden = [r for r in rows if down_count(base, r) and (m := base.mmlu(r)) is not None and m >= -BAND]
    known = any(base.mmlu(r) is not None for r in rows)
    leaning = HOLDS if all(v[1] == HOLDS for v in per_cell) and (hidden or not known) else FAILS
    if any(v[0] == FAILS for v in per_cell):
        verdict = FAILS
    elif all(v[0] == HOLDS for v in per_cell) and hidden:
        verdict = HOLDS
    else:
        verdict = UNDECIDED
    worst = worst_of(base, rows)
    mmlu = [m for r in rows if (m := base.mmlu(r)) is not None]
    observed = f"{worst_text(worst)}; " + (f"MMLU {min(mmlu):+.1f} to {max(mmlu):+.1f}; " if mmlu else "")
    observed += f"{len(hidden)} of {len(rows)} cells lose over 5 while MMLU loses 5 or less{silence_note(base, rows)}"
    down = [down_count(base, r) for r in rows]
    return conclude(base, "D4", (verdict, leaning), basis_of(changes), observed, worst and worst[0], rows, dims_down=down)


def _awq_over_gptq(base: Base) -> Finding | None:
    awq, gptq = base.pick(["awq"], ["3-bit"]), base.pick(["gptq"], ["3-bit"])
    a, g = means_of(awq), means_of(gptq)
    diffs = {d: a[d] - g[d] for d in a if d in g and a[d] != g[d]}
    if not diffs:
        return None
    wins = sum(v > 0 for v in diffs.values())
    verdict = _sign_test(wins, len(diffs))
    losses = ", ".join(d for d, v in diffs.items() if v < 0) or "none"
    observed = (
        f"AWQ higher in {wins} of {len(diffs)} dimensions (not in: {losses}), mean {np.mean(list(diffs.values())):+.1f} points"
    )
    return conclude(base, "D5", verdict, "cells", observed, wins / len(diffs), [*awq, *gptq], difference=diffs)


def _sign_test(wins: int, n: int) -> tuple[str, str]:
    from scipy.stats import binomtest

    leaning = HOLDS if 2 * wins > n else FAILS
    return (leaning if binomtest(wins, n).pvalue < ALPHA else UNDECIDED), leaning


def _quantisation_over_pruning(base: Base) -> Finding | None:
    quantised, pruned = base.pick(QUANTISED, ["8-bit"]), base.half_pruned()
    q, p = [down_count(base, r) for r in quantised], [down_count(base, r) for r in pruned]
    if not q or not p or not base.told(pruned):
        return None
    leaning = HOLDS if np.mean(p) >= 3 and np.mean(p) > np.mean(q) else FAILS
    basis = basis_of(changes_of(base, [*quantised, *pruned], DIMENSIONS, -BAND))
    verdict = UNDECIDED
    if basis == "items":
        shown = [sum(e.drop_shown(BAND) for e in base.effects.of(r["key"]).values()) for r in pruned]
        kept = all_above(changes_of(base, quantised, DIMENSIONS, -BAND), -BAND)[0]
        if leaning == HOLDS and np.mean(shown) >= 3 and kept != FAILS:
            verdict = HOLDS
        elif kept == FAILS and np.mean(p) <= np.mean(q):
            verdict = FAILS
    observed = f"dimensions down: 8-bit {np.mean(q):.1f}, 50% pruned {np.mean(p):.1f} (up to {max(p)})"
    observed += silence_note(base, [*quantised, *pruned])
    mmlu = [m for r in pruned if (m := base.mmlu(r)) is not None]
    observed += f"; pruned MMLU {min(mmlu):+.0f} to {max(mmlu):+.0f}" if mmlu else ""
    detail = {"dims_down_8bit": q, "dims_down_pruned": p, "permutation_p": _permutation(p, q)}
    return conclude(base, "D6", (verdict, leaning), basis, observed, float(np.mean(p)), [*quantised, *pruned], **detail)


def _permutation(high: Sequence[float], low: Sequence[float]) -> float:
    """One-sided p that ``high`` is not larger on average than ``low``: exact permutation (9,999 drawn where there are more)."""
    from scipy.stats import permutation_test

    if min(len(high), len(low)) < 2:  # scipy's limit; one cell on a side could not decide anyway
        return 1.0

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    test = permutation_test((high, low), difference, alternative="greater", n_resamples=9_999, rng=np.random.default_rng(0))
    return float(test.pvalue)


def _small_dense(base: Base) -> Finding | None:
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
    verdict, basis = _small_verdict(base, diffs)
    return conclude(base, "D8", (verdict, leaning), basis, observed, len(better), rows, **detail)


def _small_verdict(base: Base, diffs: dict[str, float]) -> tuple[str, str]:
    """(verdict, basis). Interval of each difference from the intervals of both scores (MOVER: Zou & Donner, Statistics in
    Medicine 27, 2008), as of independent samples: the models share prompts, so it errs on the wide side."""
    small, large = base.effects.intervals(base.small["key"]), base.effects.intervals(base.dense["key"])
    if not small or not large:
        return UNDECIDED, "point"
    shown, excluded = [], []
    for d, v in diffs.items():
        if d not in small or d not in large:
            return UNDECIDED, "items"
        a, b = base.small[d], base.dense[d]
        if v - math.hypot(a - small[d].low, large[d].high - b) > BAND:
            shown.append(d)
        elif v + math.hypot(small[d].high - a, b - large[d].low) < BAND:
            excluded.append(d)
    if len(shown) >= 3 and "fairness" in shown:
        return HOLDS, "items"
    fails = "fairness" in excluded or len(diffs) - len(excluded) < 3
    return (FAILS if fails else UNDECIDED), "items"


def _strength(row: Row) -> float | None:
    """Share of the weight bits taken away, to order the rates of one method."""
    if row["method"] in QUANTISED and row["bits"]:
        return 1 - row["bits"] / 16
    return row["sparsity"] if row["method"] in PRUNED else None


def _seed_variance(base: Base) -> Finding | None:
    spreads: dict[str, list[tuple[float, str, dict[str, float]]]] = {}
    used: list[Row] = []
    for config in {tuple(base.effects.seeds(r["key"])): r for r in base.cells}.values():
        keys = base.effects.seeds(config["key"])
        strength = _strength(config)
        if len(keys) < 2 or strength is None:
            continue
        sds = {d: s.sd for d in DIMENSIONS if (s := st.seed_spread([base.effects.rows[k][d] for k in keys]))}
        if not sds:  # silent, or scored for one seed alone
            continue
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
        observed += "; no two rates of a method differ in it"
    sds = {name: s for _, name, s in every}
    value = float(np.mean([p > 0 for p in pairs])) if pairs else None
    return conclude(base, "D9", verdict, "cells", observed, value, used, sd=sds)


def _correlation(base: Base) -> Finding | None:
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
    return conclude(
        base, "D10", (verdict, leaning), "cells", f"{observed} (n={table[0]['n']})", weak / len(table), rows, table=table
    )


def correlation_table(rows: Sequence[Row], *bases: Base) -> list[dict[str, Any]]:
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


def _pattern_order(base: Base) -> Finding | None:
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
            means = [round(float(np.mean(v)), 9) for v in values]
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
    return conclude(
        base,
        "D12",
        (verdict, leaning),
        "cells",
        "; ".join(text),
        kept / total,
        used,
        chance_of_order=chance if mmlu_kept else None,
    )


CHECKS: dict[str, Callable[[Base], Finding | None]] = {
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


# -- the claims of Beyond Perplexity ------------------------------------------------------------------------------------------


_TOXIC = ("rtp_mean_toxigen_score_ratio", "toxigen_mean_toxigen_score_ratio", "advpromptset_mean_toxigen_score_ratio")
_UNQOVER = tuple(f"unqover_{s}_model_mu" for s in ("religion", "country", "ethnicity", "gender_occupation"))
_BBQ = "bbq_avg_acc_disambiguated"


def beyond_perplexity(results: Results, bases: Sequence[Base]) -> list[Finding]:
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


def _share(base: Base, claim: str, metrics: Sequence[str], values: dict, rows: Sequence[Row], *, up: bool) -> Finding | None:
    """Share of (cell, metric) that moved the claimed way; a claim about all cells leans to holds from 3 in 4."""
    dense = values[base.dense["key"]]
    moved = [(r, m, values[r["key"]][m] - dense[m]) for r in rows for m in metrics if m in values[r["key"]] and m in dense]
    if not moved:
        return None
    share = float(np.mean([(v > 0) == up and v != 0 for _, _, v in moved]))
    far = max(moved, key=lambda f: -f[2] if up else f[2])
    observed = f"{share:.0%} of {len(moved)} values moved {'up' if up else 'down'}; furthest the other way: "
    observed += f"{far[1]} {dense[far[1]]:.3f} -> {dense[far[1]] + far[2]:.3f} ({label(far[0])})"
    return conclude(base, claim, (UNDECIDED, HOLDS if share >= 0.75 else FAILS), "point", observed, share, rows)


def _bias_accuracy(base: Base, values: dict, rows: Sequence[Row], strong: Sequence[Row]) -> Finding | None:
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
    return conclude(base, "B4", (verdict, leaning), "cells", observed, float(np.mean(pruned)), rows, permutation_p=p)


def _dialect(base: Base, values: dict, rows: Sequence[Row]) -> Finding | None:
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
    return conclude(base, "B5", (UNDECIDED, HOLDS if share >= 0.75 else FAILS), "point", observed, share, rows)
