"""A random Llama small enough to compress in milliseconds, with grouped-query attention, tied embeddings and odd widths."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch

# pytest runs with --import-mode=importlib, which adds no folder to sys.path; the tests import `small_models` from here
# and `tiny` from above.
sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]


@pytest.fixture(scope="session")
def llama():
    from small_models import make_llama

    return make_llama()


@pytest.fixture(scope="session")
def tokens():
    """Calibration tokens [8, 48] with a skewed distribution, so that inputs differ in size."""
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(8, 48, generator=generator).square() * 300).long()
