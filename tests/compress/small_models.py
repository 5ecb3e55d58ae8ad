"""Small models and inputs for the compression tests."""

from __future__ import annotations

import torch


def make_llama(layers: int = 2, hidden: int = 64, intermediate: int = 192, seed: int = 0, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, **changes,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():  # transformers' own initialisation is so small that attention is uniform and norms are all one
        if p.ndim == 1:
            p.uniform_(0.5, 1.5)
        else:
            p.mul_(4)
    return model


def skewed_inputs(tokens: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """X [T, I] float64: strongly correlated, as activations are, some inputs several times larger than others."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, inputs // 4, generator=generator, dtype=torch.float64)
    mix = torch.randn(inputs // 4, inputs, generator=generator, dtype=torch.float64)
    own = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    size = torch.logspace(-0.5, 0.5, inputs, dtype=torch.float64)[torch.randperm(inputs, generator=generator)]
    return (shared @ mix + own) * size
