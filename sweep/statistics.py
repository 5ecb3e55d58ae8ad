"""The arithmetic of a verdict: intervals, paired tests, multiplicity, equivalence, power, seed spread, transitions.

Legend of suffixes: G clusters (source prompts), K columns (one per compared cell and dimension), B bootstrap draws.
Everything is in the unit of its input; the callers use points (0-100). A cluster is one observation: 25 samples of one prompt
are not 25 (their value comes from ``effects.Parts``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..actors.intervals import Interval, wilson

Array = NDArray[np.float64]
#: Draws of an interval, and of a p-value: 9,999 so that a Holm family of 200 can still reject at 5% (smallest p is 1/10,000).
INTERVAL_DRAWS, TEST_DRAWS = 1_999, 9_999
_CHUNK = 4_000_000  # resampling weights held at once


# -- intervals --------------------------------------------------------------------------------------------------------


def interval(
    values_G: ArrayLike,
    *,
    bounds: tuple[float, float] = (0.0, 100.0),
    draws: int = INTERVAL_DRAWS,
    seed: int = 0,
) -> Interval:
    """95% interval of a mean over G clusters (one value each), within ``bounds``; (nan, nan) for none.

    A share (every value is one of the bounds) has Wilson's, everything else the studentised bootstrap (Efron & Tibshirani
    1993, section 12.5) rather than the percentile one, which covers only 85-90% for skewed scores and 16 to 48 prompts. Values
    that do not vary have no bootstrap: Wilson's over clusters at their level stands in.
    """
    x = np.asarray(values_G, float)
    g, (least, most) = len(x), bounds
    if g == 0:
        return Interval(math.nan, math.nan)
    mean = float(x.mean())
    if g < 2 or np.ptp(x) <= 1e-12 * max(1.0, abs(mean)) or (np.isclose(x, least) | np.isclose(x, most)).all():
        low, high = wilson((mean - least) / (most - least) * g, g)
        return Interval(least + (most - least) * low, least + (most - least) * high)
    found = paired_bootstrap(x, draws=draws, seed=seed)[0]
    return Interval(max(found.low, least), min(found.high, most))


def _quantiles(t: Array) -> Array:
    """Both ends of the central 95%, as drawn: interpolation between infinite t would give nan."""
    at = [max(0, math.ceil(p * len(t)) - 1) for p in (0.025, 0.975)]
    return np.sort(t)[at]


def resampling_weights(g: int, draws: int, seed: int) -> Iterator[Array]:
    """Resampling weights [b, G], rows sum to G, in chunks that fit memory; equal for equal (G, draws, seed)."""
    rng = np.random.default_rng([seed, g])
    step = max(1, _CHUNK // g)
    for start in range(0, draws, step):
        b = min(step, draws - start)
        # Counting drawn indices: several times faster than rng.multinomial, same distribution.
        drawn = rng.integers(g, size=(b, g)) + g * np.arange(b)[:, None]
        yield np.bincount(drawn.ravel(), minlength=b * g).reshape(b, g).astype(float)


# -- paired comparison ------------------------------------------------------------------------------------------------


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """Exact two-sided p of McNemar's test from the two discordant counts (binomial, 1/2); 1 where nothing changed."""
    if right_to_wrong + wrong_to_right == 0:
        return 1.0
    from statsmodels.stats.contingency_tables import mcnemar as exact

    return float(exact([[0, right_to_wrong], [wrong_to_right, 0]], exact=True).pvalue)


class Paired(NamedTuple):
    """Mean paired difference, its 95% interval, two-sided p of "no difference", number of clusters."""

    diff: float
    low: float
    high: float
    p: float
    n: int


def paired_bootstrap(effects_GK: ArrayLike, *, draws: int = TEST_DRAWS, seed: int = 0) -> list[Paired]:
    """Studentised bootstrap of K means of paired differences over the same G clusters; all columns share the resamples.

    ``effects_GK``: [G] or [G, K], difference of each cluster (compressed - dense). A column without any spread has no evidence
    either way: p is 1 if its mean is 0, else the sign test of its G equal signs.
    """
    e = np.asarray(effects_GK, float)
    e = e[:, None] if e.ndim == 1 else e
    g, k = e.shape
    if g < 2:
        return [Paired(float(e[:, j].mean()) if g else math.nan, math.nan, math.nan, 1.0, g) for j in range(k)]
    mean, se = e.mean(0), e.std(0, ddof=1) / math.sqrt(g)
    flat = se <= 1e-12 * np.maximum(1, np.abs(mean))
    centred = e - mean
    out: list[Paired] = []
    for block in range(0, k, 128):
        c = centred[:, block : block + 128]
        both, square = np.concatenate([c, c * c], axis=1), (c * c).mean(0)
        parts = []
        for w in resampling_weights(g, draws, seed):
            m, m2 = np.split(w @ both / g, 2, axis=1)
            spread = m2 - m * m
            # Of a resample without spread rounding leaves some, and some centre: neither may be divided by the other.
            spread[spread <= 1e-12 * square] = 0
            m[np.abs(m) <= 1e-9 * np.sqrt(square)] = 0
            with np.errstate(divide="ignore", invalid="ignore"):
                parts.append(m / np.sqrt(spread / (g - 1)))
        t = np.concatenate(parts)
        for j in range(c.shape[1]):
            col, s, m = t[:, j], float(se[block + j]), float(mean[block + j])
            if flat[block + j]:
                out.append(Paired(m, math.nan, math.nan, 1.0 if abs(m) < 1e-12 else min(1.0, 2 * 0.5**g), g))
                continue
            # A resample without spread has an infinite t: it counts against significance, and its centre carries none (nan).
            col = np.where(np.isnan(col), 0.0, col)
            p = (1 + int((np.abs(col) >= abs(m / s) - 1e-12).sum())) / (draws + 1)
            high_t, low_t = _quantiles(col)
            out.append(Paired(m, m - float(low_t) * s, m - float(high_t) * s, p, g))
    return out


def upper_bound(drops_G: ArrayLike, level: float) -> float:
    """One-sided upper bound of a mean drop from per-cluster drops, honest where few or no items changed.

    Solves (mu - mean)^2 G = t^2 max(s^2, step mu - mu^2). The second variance is the least that a mean of ``mu`` can have if
    an item moves in steps of ``step`` or not at all: with G clusters and no change it gives t^2/(G + t^2) of a step, as
    Tango's (1998) score interval does for paired binary data, where s = 0 would claim certainty. ``step``: median size of the
    non-zero drops, or 100 points if there is none.
    """
    from scipy.special import stdtrit  # scipy.stats.t spends 20 times as long on its arguments

    d = np.asarray(drops_G, float)
    g = len(d)
    if g < 2:
        return math.inf
    t2 = float(stdtrit(g - 1, level)) ** 2
    mean, s2, step = float(d.mean()), float(d.var(ddof=1)), _step(d)
    plain = mean + math.sqrt(t2 * s2 / g)
    # g (mu - mean)^2 = t2 (step mu - mu^2)  ->  (g + t2) mu^2 - (2 g mean + t2 step) mu + g mean^2 = 0, larger root
    a, b, c = g + t2, -(2 * g * mean + t2 * step), g * mean * mean
    root = b * b - 4 * a * c
    floor = (-b + math.sqrt(root)) / (2 * a) if root >= 0 else -math.inf
    return max(plain, floor)


def drop_p(drops_G: ArrayLike, limit: float) -> float:
    """One-sided p of H0 "the drop is ``limit`` points or more": at most 1 - level exactly where ``upper_bound(level)`` meets
    it."""
    from scipy.special import stdtr

    d = np.asarray(drops_G, float)
    g, mean = len(d), float(d.mean()) if len(d) else math.nan
    if g < 2 or not mean <= limit:
        return 1.0
    s2, step = float(d.var(ddof=1)), _step(d)
    t = (limit - mean) / math.sqrt(s2 / g) if s2 > 0 else math.inf
    # The least favourable drop of limit or more: where (mu - mean)^2 / (step mu - mu^2) is smallest.
    mu = max(limit, -mean * step / (step - 2 * mean)) if mean < 0 else limit
    if mu < step:
        t = min(t, (mu - mean) / math.sqrt(mu * (step - mu) / g))
    return float(stdtr(g - 1, -t))


def _step(d: Array) -> float:
    nonzero = np.abs(d[np.abs(d) > 1e-9])
    return float(np.median(nonzero)) if len(nonzero) else 100.0


def holm_bounds(p: Sequence[float], alpha: float = 0.05) -> list[float]:
    """Confidence level of each one-sided bound so that all hold together in Holm's step-down order: 1 - alpha/(m - rank)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    levels = [0.0] * len(p)
    for rank, i in enumerate(order):
        levels[i] = 1 - alpha / (len(p) - rank)
    return levels


# -- multiplicity, equivalence, power -----------------------------------------------------------------------------------


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm-adjusted p-values (family-wise error); None and NaN stay None and do not count."""
    # statsmodels' holm calls gc.collect() every time: 0.1 s and more in a process that holds a record
    return _adjust(p, lambda known: np.minimum(1, np.maximum.accumulate(known * np.arange(len(known), 0, -1))))


def benjamini_hochberg(p: Sequence[float | None]) -> list[float | None]:
    """Benjamini-Hochberg q-values (false discovery rate); None and NaN stay None and do not count."""
    from scipy.stats import false_discovery_control

    return _adjust(p, false_discovery_control)


def _adjust(p: Sequence[float | None], rule: Callable[[Array], Array]) -> list[float | None]:
    """``rule`` takes the known p-values in rising order."""
    known = sorted((i for i, v in enumerate(p) if v is not None and not math.isnan(v)), key=lambda i: p[i])
    out: list[float | None] = [None] * len(p)
    if known:
        for i, v in zip(known, rule(np.array([p[i] for i in known])), strict=True):
            out[i] = float(v)
    return out


def tost(diffs_G: ArrayLike, margin: float = 5.0) -> float:
    """p of the two one-sided tests that the mean difference lies within +-``margin``: the larger of the two (Schuirmann 1987).

    The bounds are those of ``upper_bound``, so that a handful of unchanged items is not taken for equivalence.
    """
    d = np.asarray(diffs_G, float)
    return max(drop_p(-d, margin), drop_p(d, margin))


def minimum_detectable_effect(sd: float, n: int) -> float:
    """Smallest mean paired difference that a two-sided test at 5% on ``n`` clusters finds with 80% power, in the unit of ``sd``."""
    return _detectable(n) * sd if n >= 2 and sd > 0 else math.nan


@cache
def _detectable(n: int) -> float:
    """In units of the standard deviation; a record asks for few different ``n``, each costs 20 ms."""
    from statsmodels.stats.power import TTestPower

    size = TTestPower().solve_power(effect_size=None, nobs=n, alpha=0.05, power=0.8, alternative="two-sided")
    return float(np.ravel(size)[0])


# -- seeds and items ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeedSpread:
    """A dimension over calibration seeds: ``unstable`` if the standard deviation exceeds ``limit`` points."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    unstable: bool


def seed_spread(values: Sequence[float | None], limit: float = 5.0) -> SeedSpread | None:
    """Spread of one score over seeds, in its unit; None for fewer than two values. Default limit: the paper's 5-point band."""
    x = np.array([v for v in values if v is not None and not math.isnan(v)], float)
    if len(x) < 2:
        return None
    sd = round(float(x.std(ddof=1)), 9)  # of equal scores rounding leaves some
    return SeedSpread(len(x), float(x.mean()), sd, float(x.min()), float(x.max()), sd > limit)


def seed_p(deltas: ArrayLike, threshold: float) -> float:
    """One-sided p of H0 "the mean over seeds is ``threshold`` or less", by Student's t; 1 for fewer than three seeds. Seeds that
    are all equal have no spread to judge by: the sign test's."""
    from scipy import stats

    x = np.asarray(deltas, float)
    if len(x) < 3 or x.mean() <= threshold:
        return 1.0
    se = round(float(x.std(ddof=1)), 9) / math.sqrt(len(x))
    return float(stats.t.sf((x.mean() - threshold) / se, len(x) - 1)) if se > 0 else 0.5 ** len(x)


#: Outcomes that count as an answer; the rest is silence of one kind or another.
ANSWERED = ("correct", "wrong", "scored", "unbiased", "biased")


def transitions(dense: Mapping[object, str], cell: Mapping[object, str]) -> dict[str, int]:
    """Counts of ``from>to`` over the answers both have (keys: (item, sample)), unchanged ones included.

    Derived counts: ``right_to_wrong``, ``wrong_to_right``, ``unbiased_to_biased``, ``biased_to_unbiased`` (stereotype),
    ``answered_to_refused``, ``refused_to_answered``, ``answered_to_silent`` (empty, unparseable, degenerate).
    """
    pairs = Counter((dense[k], cell[k]) for k in dense.keys() & cell.keys())
    out: dict[str, int] = {f"{a}>{b}": n for (a, b), n in sorted(pairs.items())}
    out["right_to_wrong"] = pairs["correct", "wrong"]
    out["wrong_to_right"] = pairs["wrong", "correct"]
    out["unbiased_to_biased"] = pairs["unbiased", "biased"]
    out["biased_to_unbiased"] = pairs["biased", "unbiased"]
    out["answered_to_refused"] = sum(n for (a, b), n in pairs.items() if a in ANSWERED and b == "refused")
    out["refused_to_answered"] = sum(n for (a, b), n in pairs.items() if a == "refused" and b in ANSWERED)
    silent = ("empty", "unparseable", "degenerate")
    out["answered_to_silent"] = sum(n for (a, b), n in pairs.items() if a in ANSWERED and b in silent)
    return out
