"""Masks, against stable sorting and against a look at every group."""

from __future__ import annotations

import pytest
import torch
from comptrust.actors.compress.masks import keep_n_of_m, keep_top, masked
from hypothesis import given, settings
from hypothesis import strategies as st


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 40), st.integers(1, 6), st.data())
@settings(max_examples=100, deadline=None)
def test_keep_top_drops_what_a_stable_sort_drops(seed, rows, columns, levels, data):
    drop = data.draw(st.integers(0, columns - 1))
    score = torch.randint(0, levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    expected = torch.ones(rows, columns, dtype=torch.bool).scatter_(1, score.sort(dim=1, stable=True).indices[:, :drop], False)
    assert torch.equal(keep_top(score, drop), expected)


@given(st.integers(0, 2**31), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (8, 16), (3, 6)]), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_keep_n_of_m_keeps_the_largest_of_every_group(seed, nm, levels):
    n, m = nm
    score = torch.randint(0, levels, (3, 4 * m), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    keep = keep_n_of_m(score, n, m)
    assert torch.equal(keep, keep_n_of_m(score, n, m))
    for row, mask in zip(score.view(-1, m).tolist(), keep.view(-1, m).tolist(), strict=True):
        kept = [v for v, k in zip(row, mask, strict=True) if k]
        assert sorted(kept) == sorted(row)[m - n :]


@pytest.mark.parametrize("drop", [1, 2, 3])
def test_ties_go_as_in_the_official_code(drop):
    """Wanda's and SparseGPT's repositories: `topk(n, largest=False)` on a slice of M columns at a time."""
    score = torch.randint(0, 3, (500, 32), generator=torch.Generator().manual_seed(drop)).float()
    score[250:] += torch.rand(250, 32, generator=torch.Generator().manual_seed(drop))  # and groups without ties
    dropped = torch.zeros_like(score, dtype=torch.bool)
    for i in range(0, 32, 4):
        dropped.scatter_(1, i + torch.topk(score[:, i : i + 4], drop, dim=1, largest=False)[1], True)
    assert torch.equal(keep_n_of_m(score, 4 - drop, 4), ~dropped)


def test_masked_weights_are_the_kept_ones_and_plain_zeros():
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    keep = W > -1
    assert torch.equal(masked(W, keep).view(torch.int32), torch.where(keep, W, 0.0).view(torch.int32))  # no -0
