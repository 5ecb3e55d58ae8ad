"""Arithmetic against published values and peer libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from comptrust.sweep import statistics as st
from comptrust.sweep.effects import Parts
from hypothesis import given, settings
from hypothesis import strategies as hs
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_paired


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)],
)
def test_wilson_published(hits, n, low, high):
    assert st.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("hits", [1, 2, 3])
def test_wilson_beside_the_ends(hits):
    """Brown, Cai and DasGupta (2001): the lower limit is lambda / n where a Poisson(lambda) count reaches ``hits`` with
    probability 5%; the other limit stays Wilson's."""
    low, high = st.wilson(hits, 29)
    assert stats.poisson.sf(hits - 1, 29 * low) == pytest.approx(0.05)
    assert high == pytest.approx(proportion_confint(hits, 29, method="wilson")[1])
    assert st.wilson(29 - hits, 29) == pytest.approx((1 - high, 1 - low))


def coverage(n):
    """(least, mean) coverage of every share in 0-1, exact: between two limits it rises and falls once, so its least value
    stands at one of them, approached from one side."""
    low, high = np.array([st.wilson(k, n) for k in range(n + 1)]).T
    ends = np.unique(np.concatenate([low, high, [1e-9, 1 - 1e-9]]))[:, None]
    shares = np.concatenate([ends - 1e-10, ends + 1e-10, np.linspace(0, 1, 5001)[:, None]]).clip(1e-12, 1 - 1e-12)
    inside = (stats.binom.pmf(np.arange(n + 1), n, shares) * ((low <= shares) & (shares <= high))).sum(axis=1)
    return inside.min(), inside[-5001:].mean()


@pytest.mark.parametrize("n", [16, 48, 96, 200, 480])
def test_wilson_covers(n):
    least, mean = coverage(n)
    assert least >= 0.92 and 0.94 <= mean <= 0.96


def test_wilson_of_nothing():
    assert all(math.isnan(v) for v in st.wilson(0, 0))


def test_mcnemar():
    assert st.mcnemar(1, 9) == pytest.approx(stats.binomtest(1, 10).pvalue)
    assert st.mcnemar(1, 9) == pytest.approx(22 / 1024)  # 2 (1 + 10) / 2^10, by hand
    assert st.mcnemar(0, 0) == 1.0


def test_interval_agrees_with_students():
    x = np.random.default_rng(1).normal(50, 20, 400)
    t = stats.t.interval(0.95, 399, x.mean(), stats.sem(x))
    assert st.interval(x) == pytest.approx(t, abs=0.3)


def test_interval_counts_a_cluster_once():
    """25 equal samples of a prompt are one observation: the interval must not shrink by a factor of 5."""
    x = np.random.default_rng(2).beta(1, 3, 48)
    parts = Parts({"all": [(i, v) for i, v in enumerate(x) for _ in range(25)]}, lambda means: 100 * means["all"])
    assert st.interval(parts.pseudo(parts.clusters)) == pytest.approx(st.interval(100 * x))


def test_interval_of_a_share_is_wilsons():
    assert st.interval([0.0, 100.0, 100.0, 0.0, 0.0]) == pytest.approx([100 * v for v in st.wilson(2, 5)])
    assert st.interval(np.zeros(48), bounds=(0, 1)) == st.wilson(0, 48)
    assert st.interval(np.full(48, 100.0)).high == pytest.approx(100)
    assert st.interval([1.0]) == pytest.approx([100 * v for v in st.wilson(0.01, 1)])
    assert all(math.isnan(v) for v in st.interval([]))


def test_paired_bootstrap_agrees_with_the_t_test():
    x = np.random.default_rng(3).normal(0.15, 1, (200, 3))
    for j, found in enumerate(st.paired_bootstrap(x)):
        want = stats.ttest_1samp(x[:, j], 0)
        assert found.p == pytest.approx(want.pvalue, abs=0.012)
        assert (found.low, found.high) == pytest.approx(tuple(want.confidence_interval()), abs=0.02)


def test_paired_bootstrap_without_spread():
    same, all_worse = st.paired_bootstrap(np.stack([np.zeros(16), np.full(16, -3.0)], axis=1))
    assert (same.diff, same.p) == (0.0, 1.0)
    assert all_worse.p == pytest.approx(2 / 2**16)  # sign test of 16 equal signs


def test_paired_bootstrap_columns_do_not_depend_on_company():
    x = np.random.default_rng(4).normal(0, 1, (30, 200))
    assert st.paired_bootstrap(x)[150] == pytest.approx(st.paired_bootstrap(x[:, 150])[0])


def test_rounding_decides_nothing_in_resamples_without_spread():
    """28 of 32 prompts change alike: in 1.4% of the resamples all do, and their t is rounding by rounding unless that is seen."""
    exact = np.array([12.5] * 28 + [-300 / 7] * 3 + [1250 / 7])
    p = st.paired_bootstrap(exact)[0].p
    for seed in range(5):
        rng = np.random.default_rng(seed)
        noisy = exact + rng.normal(0, 1e-13, 32)
        company = np.stack([noisy, rng.normal(0, 10, 32)], axis=1)
        assert st.paired_bootstrap(noisy)[0].p == st.paired_bootstrap(company)[0].p == p


def test_unchanged_items_bound_the_drop_as_tango_does():
    """Tango (1998): with no discordant pair the upper limit of the difference is z^2 / (n + z^2); ours has Student's
    quantile."""
    t2 = stats.t.ppf(0.95, 15) ** 2
    assert st.upper_bound(np.zeros(16), 0.95) == pytest.approx(100 * t2 / (16 + t2))
    assert st.drop_p(np.zeros(16), 5) > 0.05  # a smoke suite without any change is no proof
    assert st.drop_p(np.zeros(300), 5) < 0.001


drops = hs.lists(hs.sampled_from([0.0, 0.0, 0.0, 100.0, -100.0, 40.0, 3.5]), min_size=2, max_size=200)


@settings(max_examples=300, deadline=None)
@given(drops, hs.floats(0.5, 60), hs.floats(0.501, 0.999))
def test_bound_and_p_value_agree(values, limit, level):
    d = np.array(values)
    p = st.drop_p(d, limit)
    assert 0 <= p <= 1
    assert st.upper_bound(d, level) >= d.mean() - 1e-9
    bound = st.upper_bound(d, level)
    if abs(bound - limit) > 1e-6 and abs(p - (1 - level)) > 1e-9:
        assert (bound <= limit) == (p <= 1 - level)


@settings(max_examples=30, deadline=None)  # statsmodels collects garbage in every call
@given(hs.lists(hs.one_of(hs.none(), hs.floats(0, 1)), max_size=40))
def test_multiplicity_agrees_with_statsmodels(p):
    known = [v for v in p if v is not None]
    for ours, name in ((st.holm, "holm"), (st.benjamini_hochberg, "fdr_bh")):
        found = ours(p)
        assert [v is None for v in found] == [v is None for v in p]
        if known:
            assert [v for v in found if v is not None] == pytest.approx(list(multipletests(known, method=name)[1]), abs=1e-12)


def test_tost_agrees_with_statsmodels():
    d = np.random.default_rng(5).normal(1.0, 12, 300)
    assert st.tost(d, 5) == pytest.approx(ttost_paired(d, np.zeros(300), -5, 5)[0], rel=1e-6)
    assert st.tost(np.zeros(16), 5) > 0.05


def test_minimum_detectable_effect_has_80_percent_power():
    effect = st.minimum_detectable_effect(30.0, 48)
    assert TTestPower().power(effect / 30, 48, 0.05) == pytest.approx(0.8, abs=1e-6)
    assert math.isnan(st.minimum_detectable_effect(0.0, 48))


def test_seed_spread():
    # Ethics of LLAMA2-13b-chat GPTQ-4 over three seeds, as published
    spread = st.seed_spread([77.1, 80.0, 71.3])
    assert spread.sd == pytest.approx(4.43, abs=0.01)
    assert not spread.unstable
    assert st.seed_spread([60.6, 53.7, 41.3]).unstable
    assert st.seed_spread([1.0, None]) is None
    assert st.seed_spread([63.3] * 3).sd == 0  # in spite of rounding


def test_seed_p_is_students():
    x = [-46.9, -48.0, -51.5]
    assert st.seed_p([-v for v in x], 5) == pytest.approx(stats.ttest_1samp(x, -5, alternative="less").pvalue)
    assert st.seed_p(x[:2], -60) == 1.0
    assert st.seed_p([-4.0] * 3, -5) == st.seed_p([-2.8] * 3, -3) == 1 / 8


def test_transitions():
    dense = {1: "correct", 2: "correct", 3: "wrong", 4: "wrong", 5: "unbiased", 6: "refused", 7: "correct", 8: "correct"}
    cell = {1: "correct", 2: "wrong", 3: "correct", 4: "refused", 5: "biased", 6: "wrong", 7: "empty", 9: "correct"}
    found = st.transitions(dense, cell)
    assert found["correct>correct"] == found["right_to_wrong"] == found["wrong_to_right"] == found["unbiased_to_biased"] == 1
    assert found["answered_to_refused"] == found["refused_to_answered"] == found["answered_to_silent"] == 1
    assert sum(n for name, n in found.items() if ">" in name) == 7  # item 8 has no partner
