"""Do the intervals cover and do the tests hold their level? 2,000 simulated sweeps, against the truth they were drawn from.

    python benchmarks/statistics.py [--sweeps 2000] [--seed 0]

A simulated sweep is a dense cell and 6 compressed ones over 4 dimensions, half binary (one answer a prompt: Wilson, exact
McNemar), half graded (a probability, or 25 sampled answers a prompt: studentised cluster bootstrap). Under the null
compression re-draws every answer from the same prompt's distribution, so each rejection is a false discovery. Some 5 CPU
minutes.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from comptrust.sweep import statistics as st

CELLS, ALPHA = 6, 0.05
SIZES = (48, 200, 480)


def wilson_coverage(rng: np.random.Generator, sweeps: int) -> dict[str, float]:
    """Coverage of all shares in 0-1, exact by the binomial: n answers hit k times have one interval for each k. Between two
    limits coverage rises and falls once, so its least value stands at one of them, approached from one side."""
    out = {}
    least = {n: _coverage(n) for n in range(16, 601)}
    for n in (16, *SIZES):
        low, mean, inner = least[n]
        p = rng.uniform(0, 1, sweeps * 4)
        bounds = np.array([st.wilson(k, n) for k in range(n + 1)])
        k = rng.binomial(n, p)
        simulated = np.mean((bounds[k, 0] <= p) & (p <= bounds[k, 1]))
        out[f"wilson n={n}"] = {"mean": mean, "mean over 0.02-0.98": inner, "simulated mean": float(simulated), "least": low}
    out["wilson n=16-600, least"] = min(v[0] for v in least.values())
    out["wilson n=16-600, mean"] = [min(v[1] for v in least.values()), max(v[1] for v in least.values())]
    out["wilson n under 92% somewhere"] = {n: round(v[0], 4) for n, v in least.items() if v[0] < 0.92}
    return out


def _coverage(n: int) -> tuple[float, float, float]:
    """(least over shares, mean over shares, mean over shares 0.02-0.98)."""
    from scipy.stats import binom

    low, high = np.array([st.wilson(k, n) for k in range(n + 1)]).T

    def at(shares: np.ndarray) -> np.ndarray:
        # limits rise with k: a share lies in the intervals of consecutive k
        first, last = np.searchsorted(high, shares, "left"), np.searchsorted(low, shares, "right") - 1
        return binom.cdf(last, n, shares) - binom.cdf(first - 1, n, shares)

    ends = np.unique(np.concatenate([low, high]))
    sides = np.concatenate([ends - 1e-10, ends + 1e-10]).clip(1e-12, 1 - 1e-12)
    grid = (np.arange(5000) + 0.5) / 5000
    inside = at(grid)
    return float(at(sides).min()), float(inside.mean()), float(inside[(grid >= 0.02) & (grid <= 0.98)].mean())


def _graded(rng: np.random.Generator, n: int, kind: str) -> tuple[np.ndarray, float]:
    """(value of each prompt, true mean) of one dimension."""
    if kind == "probability":  # like expected maximum toxicity: right-skewed in 0-1
        return rng.beta(0.8, 3.0, n), 0.8 / 3.8
    return rng.binomial(25, rng.beta(2.0, 1.0, n)) / 25, 2 / 3  # 25 sampled answers of each prompt


def bootstrap_coverage(rng: np.random.Generator, sweeps: int) -> dict[str, float]:
    out = {}
    for kind in ("probability", "25 samples"):
        for n in SIZES:
            hits = 0
            for i in range(sweeps):
                values, truth = _graded(rng, n, kind)
                low, high = st.interval(values, bounds=(0, 1), draws=999, seed=i)
                hits += low <= truth <= high
            out[f"bootstrap {kind} n={n}"] = hits / sweeps
    return out


def false_discoveries(rng: np.random.Generator, sweeps: int) -> dict[str, dict[str, float]]:
    """Share of null sweeps with any rejection, by Holm (family-wise error) and by Benjamini-Hochberg (= false discovery rate
    here)."""
    out = {}
    for n in SIZES:
        any_holm = any_bh = raw = tests = 0
        for i in range(sweeps):
            p: list[float] = []
            for dimension in range(4):
                if dimension < 2:
                    skill = rng.beta(2.0, 1.0, n)
                    dense = rng.random(n) < skill
                    cells = rng.random((CELLS, n)) < skill
                    p += [st.mcnemar(int((dense & ~c).sum()), int((~dense & c).sum())) for c in cells]
                else:
                    base = rng.beta(0.8, 3.0, n) if dimension == 2 else rng.beta(2.0, 1.0, n)
                    noise = (
                        rng.normal(0, 0.08, (CELLS + 1, n)) if dimension == 2 else rng.binomial(25, base, (CELLS + 1, n)) / 25
                    )
                    answers = np.clip(base + noise, 0, 1) if dimension == 2 else noise
                    p += [r.p for r in st.paired_bootstrap((answers[1:] - answers[0]).T, draws=1999, seed=i)]
            tests += len(p)
            raw += sum(v < ALPHA for v in p)
            any_holm += min(st.holm(p)) < ALPHA
            any_bh += min(st.benjamini_hochberg(p)) < ALPHA
        out[f"null n={n}"] = {
            "holm": any_holm / sweeps,
            "benjamini-hochberg": any_bh / sweeps,
            "unadjusted per test": raw / tests,
        }
    return out


def discovery_rate_with_effects(rng: np.random.Generator, sweeps: int) -> dict[str, dict[str, float]]:
    """Half of the cells truly worse: the mean share of false rejections among all rejections (FDR), and the power."""
    out = {}
    for n in SIZES:
        shares, found = [], []
        for i in range(sweeps):
            shift = np.where(np.arange(CELLS) < CELLS // 2, 0.12, 0.0)
            base = rng.beta(2.0, 2.0, n)
            columns = [
                (np.clip(base + rng.normal(0, 0.15, n), 0, 1) - np.clip(base + s + rng.normal(0, 0.15, n), 0, 1)) for s in shift
            ]
            reject = (
                np.array(st.benjamini_hochberg([r.p for r in st.paired_bootstrap(np.array(columns).T, draws=1999, seed=i)]))
                < ALPHA
            )
            shares.append(reject[CELLS // 2 :].sum() / max(1, reject.sum()))
            found.append(reject[: CELLS // 2].mean())
        out[f"half affected n={n}"] = {"false discovery rate": float(np.mean(shares)), "power": float(np.mean(found))}
    return out


def qualification(rng: np.random.Generator, sweeps: int) -> dict[str, float]:
    """How often a cell whose true drop is just the limit of 5 points is shown to be within it (at most 5%), and one without
    drop."""
    out = {}
    for n in (16, *SIZES, 1000):
        for drop in (0.05, 0.0):
            skill = rng.beta(2.0, 1.0, (sweeps, n))
            dense = rng.random((sweeps, n)) < skill
            keeps = rng.random((sweeps, n)) > drop / dense.mean()
            lost = 100.0 * (dense & ~keeps)
            out[f"shown within 5 points, true drop {100 * drop:g}, n={n}"] = float(
                np.mean([st.drop_p(d, 5.0) <= ALPHA for d in lost])
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.process_time()
    for part in (wilson_coverage, bootstrap_coverage, false_discoveries, discovery_rate_with_effects, qualification):
        found = part(np.random.default_rng([args.seed, hash_name(part.__name__)]), args.sweeps)
        for name, value in found.items():
            print(f"{name:<56} {round(value, 4) if isinstance(value, float) else json.dumps(value)}", flush=True)
    print(f"{args.sweeps} sweeps, {time.process_time() - start:.0f} CPU s")


def hash_name(name: str) -> int:
    return sum(map(ord, name))


if __name__ == "__main__":
    main()
