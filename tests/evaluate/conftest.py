from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests/tiny.py
sys.path.insert(0, str(Path(__file__).parent))  # sharpened.py


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    from sharpened import sharpen
    from transformers import AutoModelForCausalLM

    return sharpen(AutoModelForCausalLM.from_pretrained(tiny_folder))


@pytest.fixture(scope="session")
def other_model(tiny_folder, tiny_model):
    """The same model, disturbed: stands for a compressed one."""
    import copy

    import torch

    model, rng = copy.deepcopy(tiny_model), torch.Generator().manual_seed(1)
    for p in model.model.layers.parameters():
        if p.dim() > 1:
            p.data.add_(torch.randn(p.shape, generator=rng) * 0.1 * p.std())
    return model
