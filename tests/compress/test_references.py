"""Whole models against the published algorithms as `benchmarks/references.py` writes them: other forwards, other masks, other gradients."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from comptrust.actors.compress import compress
from small_models import make_llama

spec = importlib.util.spec_from_file_location("references", Path(__file__).parents[2] / "benchmarks" / "references.py")
references = importlib.util.module_from_spec(spec)
spec.loader.exec_module(references)

PATTERNS = [({"sparsity": 0.5}, {"sparsity": 0.5, "nm": None}), ({"pattern": "2:4"}, {"sparsity": 0.5, "nm": (2, 4)})]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "gblm"])
@pytest.mark.parametrize(("params", "knobs"), PATTERNS)
def test_pruned_models_are_those_of_the_published_algorithm(tokens, method, params, knobs):
    llama, published = make_llama(), make_llama()
    if method != "magnitude":
        params = params | {"dense_inputs": True}
    ours = compress(llama, method, params, tokens)
    references.run(published, tokens, method, **knobs)
    same = total = 0
    for name in ours.stored:
        a, b = ours.model.get_submodule(name).weight, published.get_submodule(name).weight
        same += int((a == b).sum())
        total += a.numel()
    assert same / total > 0.999  # a score may fall on the other side of its limit by rounding, and of equal ones others may go


def test_smoothquant_is_as_close_to_the_published_one_as_their_grids_allow(tokens):
    """Ours rounds weights to 255 steps between the ends, theirs to 254; scales are the same."""
    llama, published = make_llama(), make_llama()
    ours = compress(llama, "smoothquant", {}, tokens).model
    references.run(published, tokens, "smoothquant")
    norms = [n for n, _ in llama.named_modules() if n.endswith("layernorm")]
    for name in norms:
        torch.testing.assert_close(ours.get_submodule(name).weight, published.get_submodule(name).weight, rtol=0.02, atol=0)
    dense, a, b = (m(tokens).logits for m in (llama, ours, published))
    assert 0.8 < (a - dense).norm() / (b - dense).norm() < 1.25
