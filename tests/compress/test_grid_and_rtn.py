"""Integer grids and round-to-nearest, against a search over every code in float64."""

from __future__ import annotations

import pytest
import torch
from comptrust.actors.compress import grid
from comptrust.actors.compress.base import StoredLinear
from comptrust.actors.compress.rtn import round_to_nearest
from hypothesis import given, settings
from hypothesis import strategies as st

cases = st.tuples(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([None, 8, 16, 48]),
    st.booleans(),
    st.integers(0, 2**31),
    st.floats(1e-4, 1e3),
)


@given(cases)
@settings(max_examples=60, deadline=None)
def test_rtn_picks_the_nearest_code_of_a_half_precision_grid(case):
    bits, group, symmetric, seed, size = case
    W = torch.randn(5, 48, generator=torch.Generator().manual_seed(seed)) * size
    s = round_to_nearest(W, bits, group, symmetric)
    G = 48 // (group or 48)
    assert s.codes.shape == (5, 48) and s.scale.shape == (5, G) and s.scale.dtype == torch.float16
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert s.codes.min() >= low and s.codes.max() <= high
    scale = s.scale.double().repeat_interleave(group or 48, 1)
    zero = 0 if symmetric else s.zero.double().repeat_interleave(group or 48, 1)
    levels = torch.arange(low, high + 1, dtype=torch.float64)
    every = (levels - (zero[..., None] if not symmetric else 0)) * scale[..., None]
    best = (every - W.double()[..., None]).abs().amin(-1)
    mine = ((s.codes.double() - zero) * scale - W.double()).abs()
    assert (mine <= best * (1 + 1e-5) + scale * 1e-5).all()
    stored = StoredLinear("w", (5, 48), bits, s.codes, s.scale, s.zero, group_size=group)
    assert torch.equal(stored.dequantise(), s.W_OI)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_pruned_weight_stays_zero_on_an_asymmetric_grid(bits, seed):
    W = torch.rand(4, 32, generator=torch.Generator().manual_seed(seed)) + 3  # all on one side of zero
    W[:, ::2] = 0
    s = round_to_nearest(W, bits, 16, symmetric=False)
    assert (s.W_OI[:, ::2] == 0).all()


def test_symmetric_scale_is_two_over_levels_of_the_largest_weight():
    scale, zero = grid.fit(torch.tensor([[0.5, -7.5]]), 4, symmetric=True)
    assert zero is None and scale.item() == 1.0  # 2 * 7.5 / 15
    assert grid.quantise(torch.tensor([[0.5, -7.5, 7.5]]), scale, None, 4).tolist() == [[0.0, -8.0, 7.0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_weights_do_not_all_shrink(bits):
    """They lie half-way between two codes: with a scale rounded up the largest weight of a group lost half a step, whatever its sign."""
    W = torch.randn(5000, 16, generator=torch.Generator().manual_seed(bits)) * 0.02
    scale, _ = grid.fit(W, bits, symmetric=True)
    assert (scale <= 2 * W.abs().amax(1, keepdim=True) / (2**bits - 1)).all()
    largest = W.gather(1, W.abs().argmax(1, keepdim=True))
    codes = grid.quantise(largest, scale, None, bits)
    assert torch.equal(codes, torch.where(largest < 0, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1))


@pytest.mark.parametrize("W", [torch.zeros(2, 16), torch.full((2, 16), 1e-12)])
def test_vanishing_weights_give_finite_zeros(W):
    for symmetric in (True, False):
        s = round_to_nearest(W, 4, 8, symmetric)
        assert torch.isfinite(s.W_OI).all() and (s.scale > 0).all() and s.W_OI.abs().max() < 1e-6
