from __future__ import annotations

import torch
from comptrust.actors.compress import compress
from small_models import make_llama


def linears(model):
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def test_each_scope_drops_its_own_smallest(llama):
    dense = linears(llama)
    for scope in ("layer", "row", "global"):
        got = linears(compress(llama, "magnitude", {"sparsity": 0.3, "scope": scope}).model)
        flat = torch.cat([w.abs().flatten() for w in dense.values()]).sort().values
        for name, W in dense.items():
            dropped = got[name] == 0
            assert torch.equal(got[name][~dropped], W[~dropped])  # nothing else changes
            if scope == "layer":
                limit = W.abs().flatten().sort().values[int(W.numel() * 0.3)]
            elif scope == "row":
                limit = W.abs().sort(1).values[:, int(W.shape[1] * 0.3), None]
            else:
                limit = flat[int(len(flat) * 0.3)]
            assert torch.equal(dropped, W.abs() < limit), (scope, name)


def test_global_counts_exactly_even_with_ties():
    model = make_llama()
    for W in linears(model).values():
        W.copy_(W.sign() * 0.25)
    got = linears(compress(model, "magnitude", {"sparsity": 0.5, "scope": "global"}).model)
    zeros, total = sum(int((w == 0).sum()) for w in got.values()), sum(w.numel() for w in got.values())
    assert zeros == total // 2


def test_a_pattern_holds_in_every_group(llama):
    done = compress(llama, "magnitude", {"pattern": "2:4"})
    for W in linears(done.model).values():
        assert ((W.view(-1, 4) != 0).sum(1) == 2).all()
    assert done.sparsity_reached == 0.5 and {r["sparsity"] for r in done.layers} == {0.5}
