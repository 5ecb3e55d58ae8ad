"""GPTQ, against optimal brain quantisation in float64: the inverse Hessian itself, downdated column by column."""

from __future__ import annotations

import pytest
import torch
from comptrust.actors.compress import compress, grid
from comptrust.actors.compress.base import Inputs, StoredLinear
from comptrust.actors.compress.gptq import GptqConfig, solve
from comptrust.actors.compress.rtn import round_to_nearest
from comptrust.actors.compress.second_order import inverse_factor, inverse_upper, lazy_blocks, nested_order
from comptrust.actors.errors import CellError
from small_models import skewed_inputs


def obq(W, H, config, perm):
    """The paper's equation 2 and 3 with no Cholesky, no blocks: [O, I] float64 quantised in the order ``perm``."""
    group = config.group_size or W.shape[1]
    H, W = H[perm][:, perm].clone(), W[:, perm].clone()
    H.diagonal().add_(config.damping * H.diagonal().mean())
    inverse = torch.linalg.inv(H)
    Q = torch.zeros_like(W)
    for i in range(W.shape[1]):
        if i % group == 0:
            scale, zero = grid.fit(W[:, i : i + group].float(), config.bits, config.symmetric)
            scale, zero = scale.double()[:, 0], None if zero is None else zero.double()[:, 0]
        q = grid.dequantise(grid.quantise(W[:, i], scale, zero, config.bits), scale, zero)
        Q[:, i] = q
        W[:, i:] -= ((W[:, i] - q) / inverse[i, i])[:, None] * inverse[i, i:]
        inverse = inverse - inverse[:, i, None] * inverse[None, i] / inverse[i, i]  # the column leaves the problem
    return Q[:, perm.argsort()]


@pytest.mark.parametrize("group", [16, None])
@pytest.mark.parametrize("order", ["none", "act", "group-aware"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
def test_equals_optimal_brain_quantisation(group, order, bits, symmetric):
    X = skewed_inputs(200, 64)
    W = torch.randn(12, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    config = GptqConfig(bits=bits, group_size=group, symmetric=symmetric, order=order, scale_search=0, token_clip=None)
    H = X.T @ X
    diag = H.diagonal()
    if order == "none":
        perm = torch.arange(64)
    elif order == "act" or group is None:
        perm = diag.argsort(descending=True)
    else:
        blocks = [sorted(range(b, b + group), key=lambda i: -diag[i]) for b in range(0, 64, group)]
        perm = torch.tensor([i for b in sorted(blocks, key=lambda b: -diag[b[0]]) for i in b])
    expected = obq(W, H, config, perm)
    solution = solve(W.float(), Inputs(["w"], [12], gram=H.float()), config)
    # A weight near the middle between two codes may round the other way in float32, and what follows with it.
    same = (solution.W_OI.double() - expected).abs() < 1e-4
    assert same.double().mean() > 0.97
    loss = lambda Q: ((W - Q) @ X.T).norm()
    assert abs(loss(solution.W_OI.double()) / loss(expected) - 1) < 0.02
    stored = StoredLinear("w", (12, 64), bits, solution.codes, solution.scale, solution.zero, group, solution.group_index)
    assert torch.equal(stored.dequantise(), solution.W_OI)
    assert (solution.group_index is not None) == (order == "act" and group is not None)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_beats_rounding_on_the_layer_objective_and_ours_beats_the_reference(bits):
    X = skewed_inputs(400, 64, seed=bits)
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    inputs = Inputs(["w"], [32], gram=(X.T @ X).float())
    loss = lambda Q: float(((W - Q.double()) @ X.T).norm())
    rtn = loss(round_to_nearest(W.float(), bits, 16, True).W_OI)
    reference = loss(solve(W.float(), inputs, GptqConfig(bits=bits, group_size=16, variant="reference")).W_OI)
    ours = loss(solve(W.float(), inputs, GptqConfig(bits=bits, group_size=16)).W_OI)
    assert reference < 0.8 * rtn
    assert ours < reference


def test_a_dead_input_costs_nothing():
    X = skewed_inputs(200, 32)
    X[:, 5] = 0
    W = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Q = solve(W.float(), Inputs(["w"], [4], gram=(X.T @ X).float()), GptqConfig(group_size=16)).W_OI
    assert torch.isfinite(Q).all() and (Q[:, 5] == 0).all()


def test_groups_wider_than_a_lazy_block_have_a_grid_each():
    """288 does not divide into blocks of 128; compared with the grid that the group's own codes would choose."""
    X = skewed_inputs(800, 576)
    W = torch.randn(4, 576, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W[:, 288:] *= 5
    config = GptqConfig(group_size=288, variant="reference", token_clip=None)
    solution = solve(W.float(), Inputs(["w"], [4], gram=(X.T @ X).float()), config)
    assert solution.scale.shape == (4, 2) and (solution.scale[:, 1] > 3 * solution.scale[:, 0]).all()
    expected = obq(W, X.T @ X, config, torch.arange(576))
    loss = lambda Q: float(((W - Q) @ X.T).norm())
    assert abs(loss(solution.W_OI.double()) / loss(expected) - 1) < 0.02


def test_lazy_blocks_end_where_groups_do():
    assert list(lazy_blocks(640, 320, 128)) == [(0, 128), (128, 256), (256, 320), (320, 448), (448, 576), (576, 640)]
    assert list(lazy_blocks(100, 64, 64)) == [(0, 64), (64, 100)]


@pytest.mark.parametrize("n", [1, 100, 129, 576])
def test_inverse_by_halves_equals_the_inverse(n):
    R = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).triu()
    R.diagonal().abs_().add_(n**0.5)
    assert torch.allclose(inverse_upper(R), torch.linalg.inv(R), atol=1e-12)


def test_damping_escalates_and_then_says_which_layer():
    v = torch.randn(16, 1)
    H = v @ v.T  # rank one: Cholesky needs damping
    U = inverse_factor(H, 1e-12, name="w", escalate=(1e6, 1e11))
    assert torch.isfinite(U).all()
    with pytest.raises(CellError, match=r"blocks\.3\.w"):
        inverse_factor(-torch.eye(4), 1e-3, name="blocks.3.w")


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse():
    X = skewed_inputs(100, 40)
    H = X.T @ X
    U = inverse_factor(H.float(), 0.01, name="w").double()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    expected = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    assert torch.allclose(U, expected, rtol=2e-3, atol=1e-5 * expected.abs().max())


def test_nested_order_keeps_blocks_together():
    diag = torch.tensor([1.0, 9, 2, 2, 5, 7, 8, 0])
    assert nested_order(diag).tolist() == [1, 6, 5, 4, 2, 3, 0, 7]
    assert nested_order(diag, 2).tolist() == [1, 0, 6, 7, 5, 4, 2, 3]
    assert nested_order(diag, 2, 4).tolist() == [1, 0, 2, 3, 6, 7, 5, 4]
    with pytest.raises(ValueError, match="8 inputs"):
        nested_order(diag, 3)


def test_reference_variant_sets_the_published_knobs_and_each_stays_free():
    published = GptqConfig(variant="reference")
    assert (published.order, published.damping, published.token_clip, published.scale_search) == ("none", 0.01, None, 0)
    assert GptqConfig(variant="reference", order="act").order == "act"


def test_on_a_model_every_weight_is_a_stored_code(llama, tokens):
    done = compress(llama, "gptq", {"bits": 3, "group_size": 32}, tokens)
    for name, stored in done.stored.items():
        assert torch.equal(done.model.get_submodule(name).weight, stored.dequantise())
        assert stored.codes.min() >= -4 and stored.codes.max() <= 3
    assert done.bits_per_weight == 3 + 16 / 32
