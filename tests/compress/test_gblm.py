from __future__ import annotations

import copy

import pytest
import torch
from comptrust.actors.compress import compress, gblm
from comptrust.actors.compress.gblm import GblmConfig, prepare
from comptrust.actors.errors import CellError
from small_models import make_llama


def test_gradients_are_those_of_the_whole_model(tokens):
    """Against autograd through the whole model, sequence by sequence."""
    model = make_llama().requires_grad_(True)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    squares = {n: torch.zeros_like(m.weight) for n, m in linears.items()}
    for row in tokens[:3]:
        model.zero_grad()
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for n, m in linears.items():
            squares[n] += m.weight.grad.square()
    got = prepare(model, linears, GblmConfig(), tokens=tokens[:3], places=[torch.device("cpu")] * 2)
    assert got.samples == 3 and got.norms.keys() == linears.keys()
    for n in linears:
        assert torch.allclose(got.norms[n], squares[n].sqrt(), rtol=1e-3, atol=1e-4 * float(squares[n].max().sqrt()))
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_do_not_underflow_in_float16(llama, tokens):
    linears = {n: m for n, m in llama.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    exact, half = (
        prepare(m, linears, GblmConfig(), tokens=tokens[:2].repeat(1, 8), places=[torch.device("cpu")] * 2).norms
        for m in (llama, copy.deepcopy(llama).half())
    )
    errors = [float((half[n] - exact[n]).norm() / exact[n].norm()) for n in linears]
    assert max(errors) < 0.02, errors


def test_without_the_gradient_it_is_wanda_and_with_it_is_not(llama, tokens):
    wanda = compress(llama, "wanda", {"variant": "reference"}, tokens).model.state_dict()
    plain = compress(llama, "gblm", {"gradient_scale": 0.0}, tokens).model.state_dict()
    full = compress(llama, "gblm", {}, tokens).model.state_dict()
    assert all(torch.equal(wanda[k], plain[k]) for k in wanda)
    assert any(not torch.equal(wanda[k], full[k]) for k in wanda)


def test_gradients_that_are_not_finite_name_the_layer(tokens, monkeypatch):
    """They once compared as lower than nothing, and every weight went."""
    monkeypatch.setattr(gblm, "LOSS_SCALE", 1e8)  # more than float16 holds
    with pytest.raises(CellError, match=r"model\.layers\.1\.\S*: the gradient of its weights is not finite"):
        compress(make_llama().half(), "gblm", {}, tokens)
