"""Wanda, against its formula written out on inputs recorded from the model itself."""

from __future__ import annotations

import pytest
import torch
from comptrust.actors.compress import compress
from comptrust.actors.compress.gblm import GblmConfig
from comptrust.actors.compress.wanda import WandaConfig


@pytest.mark.parametrize("params", [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": "2:4"}, {"pattern": "8:16"}])
def test_every_mask_is_that_of_the_inputs_the_layer_sees(llama, tokens, params):
    done = compress(llama, "wanda", params | {"dense_inputs": False}, tokens)
    seen: dict[str, torch.Tensor] = {}
    modules = {n: m for n, m in done.model.named_modules() if n in done.stored}
    hooks = [
        m.register_forward_pre_hook(lambda _, a, n=n: seen.__setitem__(n, a[0].reshape(-1, a[0].shape[-1]).double()))
        for n, m in modules.items()
    ]
    done.model(tokens)  # true-sequential: each layer was scored on what the compressed layers before it give
    for hook in hooks:
        hook.remove()
    agree = total = 0
    for name, module in modules.items():
        W = llama.get_submodule(name).weight.double()
        score = W.abs() * seen[name].norm(dim=0)
        if "pattern" in params:
            n, m = map(int, params["pattern"].split(":"))
            limit = score.view(len(W), -1, m).sort(-1).values[..., m - n].repeat_interleave(m, 1)
        else:
            limit = score.sort(1).values[:, int(W.shape[1] * params["sparsity"]), None]
        expected = torch.where(score >= limit, W, 0.0)
        agree += int((expected == module.weight.double()).sum())
        total += W.numel()
    assert agree / total > 0.9999  # a score may fall on the other side of its limit by rounding


def test_zero_inputs_are_dropped_first():
    from comptrust.actors.compress.base import Inputs
    from comptrust.actors.compress.wanda import WandaConfig, solve

    W = torch.full((3, 8), 9.0)
    norm = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])
    kept = solve(W, Inputs(["w"], [3], norm=norm), WandaConfig()).W_OI
    assert torch.equal(kept != 0, (norm > 0).expand(3, 8))


def test_a_whole_block_is_scored_on_its_dense_inputs(llama, tokens):
    """Block 0 against the formula on inputs of the dense model; o_proj and down_proj would differ if scored as it goes."""
    done = compress(llama, "wanda", {"pattern": "2:4"}, tokens)
    names = [n for n in done.stored if ".0." in n]
    seen = {}
    hooks = [
        llama.get_submodule(n).register_forward_pre_hook(
            lambda _, a, n=n: seen.__setitem__(n, a[0].reshape(-1, a[0].shape[-1]))
        )
        for n in names
    ]
    llama(tokens)
    for hook in hooks:
        hook.remove()
    for name in names:
        W = llama.get_submodule(name).weight
        score = (W.abs() * seen[name].norm(dim=0)).view(-1, 4)
        expected = W.view(-1, 4).where(score >= score.sort(1).values[:, 2:3], 0.0).view(W.shape)
        assert (done.model.get_submodule(name).weight == expected).float().mean() > 0.9999, name


def test_only_patterns_and_the_reference_take_dense_inputs(llama, tokens):
    assert not WandaConfig().dense_inputs and not WandaConfig(sparsity=0.3).dense_inputs
    assert (
        WandaConfig(pattern="2:4").dense_inputs and WandaConfig(variant="reference").dense_inputs and GblmConfig().dense_inputs
    )
    ours, dense = (compress(llama, "wanda", {"variant": v}, tokens).model for v in ("comptrust", "reference"))
    same = {
        n: torch.equal(ours.get_submodule(n).weight, dense.get_submodule(n).weight)
        for n in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj")
    }
    assert list(same.values()) == [True, False, False]  # inside the block o_proj is pruned before the others see their inputs
