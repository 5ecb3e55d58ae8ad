"""SparseGPT, against optimal brain surgeon in float64 and against the best weights any mask could have."""

from __future__ import annotations

import pytest
import torch
from comptrust.actors.compress import compress
from comptrust.actors.compress.base import Inputs, StoredLinear
from comptrust.actors.compress.sparsegpt import SparseGptConfig, refit, solve
from comptrust.actors.compress.wanda import WandaConfig
from comptrust.actors.compress.wanda import solve as wanda
from small_models import skewed_inputs


def problem(seed=0, rows=16, columns=64):
    X = skewed_inputs(300, columns, seed)
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)
    return X, W, X.T @ X


def surgeon(W, H, keep_of, block):
    """Algorithm 1 with the inverse Hessian downdated explicitly; ``keep_of(scores)`` masks a block of columns."""
    W, H = W.clone(), H.clone()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    inverse = torch.linalg.inv(H)
    for i in range(W.shape[1]):
        if i % block == 0:
            # The diagonal each column will have once those before it are gone.
            rest = inverse[i:, i:].clone()
            left = []
            for j in range(min(block, len(rest))):
                left.append(rest[j, j].clone())
                rest = rest - rest[:, j, None] * rest[None, j] / rest[j, j]
            keep = keep_of(W[:, i : i + block].square() / torch.stack(left))
        q = W[:, i] * keep[:, i % block]
        W[:, i:] -= ((W[:, i] - q) / inverse[i, i])[:, None] * inverse[i, i:]
        W[:, i] = q
        inverse = inverse - inverse[:, i, None] * inverse[None, i] / inverse[i, i]
    return W


def test_unstructured_equals_the_surgeon():
    X, W, H = problem()
    keep_of = lambda s: s > s.flatten().sort().values[s.numel() // 2 - 1]
    expected = surgeon(W, H, keep_of, block=32)
    got = solve(W.float(), Inputs(["w"], [16], gram=H.float()), SparseGptConfig(block=32, refit=0)).W_OI.double()
    assert ((got != 0) == (expected != 0)).double().mean() > 0.995
    assert abs(((W - got) @ X.T).norm() / ((W - expected) @ X.T).norm() - 1) < 0.01
    assert int((got == 0).sum()) == W.numel() // 2


@pytest.mark.parametrize(("group", "block"), [(16, 32), (16, 40), (32, 32), (64, 32), (None, 32)])
def test_with_bits_the_mask_is_chosen_per_block_and_not_per_group(group, block):
    """8 bits hardly move a weight, so the mask is that of the surgeon with blocks of 32 columns: two groups of 16, half of one of 64."""
    _, W, H = problem()
    keep_of = lambda s: s > s.flatten().sort().values[s.numel() // 2 - 1]
    expected = surgeon(W, H, keep_of, block=32) != 0
    config = SparseGptConfig(bits=8, group_size=group, block=block, variant="reference")
    got = solve(W.float(), Inputs(["w"], [16], gram=H.float()), config).W_OI != 0
    assert (got == expected).double().mean() > 0.98
    assert (surgeon(W, H, keep_of, block=16).ne(0) == expected).double().mean() < 0.95


def test_two_of_four_equals_the_surgeon():
    X, W, H = problem(1)
    keep_of = lambda s: s >= s.sort(1).values[:, 2, None]
    expected = surgeon(W, H, keep_of, block=4)
    config = SparseGptConfig(pattern="2:4", variant="reference")
    got = solve(W.float(), Inputs(["w"], [16], gram=H.float()), config).W_OI.double()
    assert ((got != 0) == (expected != 0)).double().mean() > 0.98
    assert abs(((W - got) @ X.T).norm() / ((W - expected) @ X.T).norm() - 1) < 0.02


@pytest.mark.parametrize("params", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"}, {"pattern": "1:2"}])
def test_lies_between_the_best_of_its_mask_and_pruning_without_repair(params):
    X, W, H = problem(2)
    inputs = Inputs(["w"], [16], gram=H.float(), norm=X.norm(dim=0).float())
    got = solve(W.float(), inputs, SparseGptConfig(**params)).W_OI.double()
    loss = lambda Q: float(((W - Q) @ X.T).norm())
    best = torch.zeros_like(W)
    for o in range(len(W)):  # dense least squares on the kept columns of each row
        kept = got[o] != 0
        best[o, kept] = torch.linalg.lstsq(X[:, kept], X @ W[o]).solution
    plain = loss(wanda(W.float(), inputs, WandaConfig(**params)).W_OI.double())
    assert loss(best) <= loss(got) < 0.8 * plain


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_refit_ends_at_the_least_squares_of_its_mask(damping):
    """The normal equations of each row's kept columns, solved in float64."""
    _, W, H = problem(4)
    ridge = damping * H.diagonal().mean()
    A = H + ridge * torch.eye(len(H), dtype=torch.float64)
    V = solve(W.float(), Inputs(["w"], [16], gram=H.float()), SparseGptConfig(refit=0)).W_OI
    expected = torch.zeros_like(W)
    for o in range(len(W)):
        kept = V[o] != 0
        expected[o, kept] = torch.linalg.solve(A[kept][:, kept], A[kept] @ W[o])

    def loss(Q):
        D = Q.double() - W
        return float(((D @ A) * D).sum())

    losses = [loss(refit(V, W.float(), H.float(), damping, steps)) for steps in (0, 1, 2, 4, 8, 64)]
    assert losses == sorted(losses, reverse=True) and losses[-2] < 0.9 * losses[0]
    assert losses[-1] == pytest.approx(loss(expected), rel=1e-4)
    done = refit(V.double(), W, H, damping, 200)  # the same in float64: to the last digits
    assert torch.equal(done != 0, V != 0)
    assert (done - expected).norm() < 1e-6 * expected.norm()


def test_refit_leaves_alone_what_cannot_be_better():
    """Nothing pruned, and inputs that are never seen: no division by zero."""
    _, W, H = problem(5)
    assert torch.allclose(refit(W, W, H, 0.01, 6), W)
    H = torch.zeros(64, 64, dtype=torch.float64)
    V = W.where(W > 0, 0.0)
    assert torch.equal(refit(V, W, H, 0.01, 6), V)


def test_refit_is_for_weights_without_a_grid():
    assert SparseGptConfig().refit > 0 and SparseGptConfig(variant="reference").refit == 0
    assert SparseGptConfig(bits=4, group_size=16).refit == 0
    assert "leave their grid" in SparseGptConfig(bits=4, group_size=16, refit=2).impossible()


def test_a_group_of_scales_holds_whole_groups_of_the_pattern():
    assert "try 16" in SparseGptConfig(pattern="4:8", bits=4, group_size=12).impossible()
    assert SparseGptConfig(pattern="4:8", bits=4, group_size=24).impossible() is None


def test_ours_orders_groups_for_patterns_only():
    assert SparseGptConfig(pattern="2:4").order == "group-aware" and SparseGptConfig(pattern="2:4").token_clip == 8
    assert SparseGptConfig(sparsity=0.5).order == "none" and SparseGptConfig(sparsity=0.5).token_clip is None
    assert SparseGptConfig(pattern="2:4", variant="reference").order == "none"


@pytest.mark.parametrize("symmetric", [True, False])
def test_joint_pruning_and_quantisation_obeys_both(symmetric):
    _, W, H = problem(3)
    config = SparseGptConfig(pattern="2:4", bits=4, group_size=16, symmetric=symmetric)
    s = solve(W.float(), Inputs(["w"], [16], gram=H.float()), config)
    assert ((s.W_OI.view(-1, 4) != 0).sum(1) <= 2).all()
    stored = StoredLinear("w", (16, 64), 4, s.codes, s.scale, s.zero, group_size=16)
    assert torch.equal(stored.dequantise(), s.W_OI)


def test_sparse_and_quantised_model_costs_three_bits_and_scales(llama, tokens):
    done = compress(llama, "sparsegpt", {"pattern": "2:4", "bits": 4, "group_size": 32}, tokens)
    assert done.bits_per_weight == pytest.approx(4 / 2 + 1 + 16 / 32)
    for name in done.stored:
        assert ((done.model.get_submodule(name).weight.view(-1, 4) != 0).sum(1) <= 2).all()
