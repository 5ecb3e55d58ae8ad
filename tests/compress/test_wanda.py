"""Wanda, against its formula written out on inputs recorded from the model itself."""

from __future__ import annotations

import pytest
import torch
from comptrust.actors.compress import compress


@pytest.mark.parametrize("params", [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": "2:4"}, {"pattern": "8:16"}])
def test_every_mask_is_that_of_the_inputs_the_layer_sees(llama, tokens, params):
    done = compress(llama, "wanda", params, tokens)
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
