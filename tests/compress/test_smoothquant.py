from __future__ import annotations

import torch
from comptrust.actors.compress import compress
from comptrust.actors.compress.base import Inputs
from comptrust.actors.compress.smoothquant import SmoothQuantConfig, W8A8Linear, round_tokens, solve
from comptrust.actors.compress.structure import Fold


def test_scale_is_equation_four():
    W = torch.randn(6, 8)
    top = torch.rand(8) * 30
    got = solve(W, Inputs(["w"], [6], max_abs=top, fold=Fold("n", "norm")), SmoothQuantConfig(alpha=0.7))
    expected = top**0.7 / W.abs().amax(0) ** 0.3
    assert torch.allclose(got.input_scale, expected)
    assert (got.W_OI / expected - W).abs().max() < 0.02 * W.abs().max() * 3


def test_tokens_are_rounded_to_255_levels_each():
    x = torch.randn(4, 50) * torch.tensor([1.0, 10, 100, 1e-3])[:, None]
    q = round_tokens(x)
    step = x.abs().amax(1, keepdim=True) / 127
    assert ((q - x).abs() <= step / 2 * 1.001).all()
    assert torch.allclose((q / step).round(), q / step, atol=1e-3)
    assert torch.equal(round_tokens(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_model_folds_into_norms_and_runs_on_rounded_activations(llama, tokens):
    done = compress(llama, "smoothquant", {}, tokens)
    modules = [m for m in done.model.modules() if isinstance(m, W8A8Linear)]
    assert len(modules) == 14 and all(m.input_scale is None for m in modules)
    assert all(type(m) is torch.nn.Linear for n, m in llama.named_modules() if n in done.stored)
    dense = llama(tokens).logits
    error = (done.model(tokens).logits - dense).norm() / dense.norm()
    weights_only = (compress(llama, "rtn", {"bits": 8, "group_size": None}).model(tokens).logits - dense).norm() / dense.norm()
    assert weights_only < error < 0.1  # rounding activations costs something, and not much
