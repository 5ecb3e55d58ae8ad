from __future__ import annotations

import numpy as np
import pytest
from comptrust.actors.evaluate import conventions as cv
from comptrust.actors.evaluate.fairness import _combine, gaps
from comptrust.actors.intervals import wilson
from hypothesis import assume, given, settings
from hypothesis import strategies as st


def mean_score(means):
    return 100 * cv.nanmean(means.values())


@pytest.mark.parametrize(("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)])
def test_wilson_against_the_closed_form(hits, n, low, high):
    # Agresti & Coull 1998, table values by hand: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_bootstrap_of_one_binary_cell_is_near_the_binomial():
    rng = np.random.default_rng(0)
    pairs = [(i, float(v)) for i, v in enumerate(rng.random(400) < 0.3)]
    e = cv.estimate({"a": pairs}, mean_score)
    p = np.mean([v for _, v in pairs])
    assert e.value == pytest.approx(100 * p)
    half = 1.96 * np.sqrt(p * (1 - p) / 400) * 100
    assert e.high - e.value == pytest.approx(half, rel=0.15)
    assert e.value - e.low == pytest.approx(half, rel=0.15)


def test_interval_covers_the_truth_and_repeats_itself():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(60):
        cells = {c: [(f"{c}{i}", float(v)) for i, v in enumerate(rng.random(50) < p)] for c, p in (("a", 0.2), ("b", 0.7))}
        e = cv.estimate(cells, mean_score)
        covered += e.low <= 45 <= e.high
        assert cv.estimate(cells, mean_score) == e
    assert covered >= 50  # 95% of 60 is 57; 50 or fewer has probability below 1e-3


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(2)
    values = [float(v) for v in rng.random(100) < 0.5]
    alone = cv.estimate({"a": [(i, v) for i, v in enumerate(values) for _ in range(5)]}, mean_score)
    apart = cv.estimate({"a": [(5 * i + k, v) for i, v in enumerate(values) for k in range(5)]}, mean_score)
    assert alone.high - alone.low > 1.8 * (apart.high - apart.low)


@pytest.mark.parametrize("size", [1, 2, 5, 20])
def test_the_interval_does_not_depend_on_how_few_prompts_a_cell_has(size):
    """Stereotype asks one prompt in most of its 384 cells: a cell whose prompt was not drawn dropped out, and with it its spread."""
    values = [float(v) for v in np.random.default_rng(3).random(160) < 0.6]
    cells = {c: [(i, values[i]) for i in range(c, 160, 160 // size)] for c in range(160 // size)}
    e = cv.estimate(cells, mean_score)
    assert e.value == pytest.approx(100 * np.mean(values))
    assert e.high - e.low == pytest.approx(2 * 196 * np.std(values) / np.sqrt(160), rel=0.1)


@pytest.mark.parametrize("value", [1.0, 2 / 3, 0.1])
def test_all_alike_still_has_an_interval(value):
    e = cv.estimate({"a": [(i, value) for i in range(16)]}, mean_score)
    assert e.value == pytest.approx(100 * value)
    assert (e.low, e.high) == pytest.approx([100 * b for b in wilson(16 * value, 16)])


def test_no_answers_no_score():
    assert cv.estimate({"a": []}, mean_score).value is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("ab")), min_size=8, max_size=40))
def test_group_gaps_equal_fairlearn(rows):
    labels, predictions, groups = (list(map(int, c)) if i < 2 else list(c) for i, c in enumerate(zip(*rows, strict=True)))
    assume(len({(g, y) for y, _, g in rows}) == 4)  # fairlearn counts an absent label as rate 0, we leave it out
    means = {}
    for y, p, g in zip(labels, predictions, groups, strict=True):
        for key in (None, y):
            means.setdefault(("cell", g, key), []).append(float(p))
    means = {k: np.array([np.mean(v)]) for k, v in means.items()}
    dpd, eod = gaps(labels, predictions, groups)
    assert _combine("dpd")(means)[0] == pytest.approx(dpd)
    assert _combine("eod")(means)[0] == pytest.approx(eod)


def test_samples_of_a_prompt_do_not_narrow_the_interval_of_a_share():
    """32 prompts, five answers each, refused with a probability that differs by prompt: 0.5 on average."""
    rng, covered, times = np.random.default_rng(0), 0, 200
    for _ in range(times):
        refused = rng.random((5, 32)) < rng.beta(0.3, 0.3, 32)
        rows = [{"cluster": prompt} for prompt in range(32) for _ in range(5)]
        (share,) = cv.rates("privacy", "", {"refusal": int(refused.sum())}, rows)
        assert share.n == 160 and share.value == pytest.approx(refused.mean())
        covered += share.ci_low <= 0.5 <= share.ci_high
    assert covered >= 0.94 * times  # Wilson of 160 independent answers: 0.70
