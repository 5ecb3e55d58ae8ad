"""Attention over a pack, in blocks: tokens of different prompts that cannot see each other are not multiplied either.

A pack's mask is mostly zero. Its queries are cut into blocks, and each block meets only the keys that some token of it may see.

Legend: B batch, H heads, T queries, N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

#: Queries of a block: fewer meet fewer keys, more make larger products.
BLOCK = 64
_NAME = "comptrust_blocks"
_blocks: Sequence[tuple[int, int, torch.Tensor]] = ()


def blocks(seen_TN: np.ndarray, device: torch.device) -> list[tuple[int, int, torch.Tensor]]:
    """(first query, last + 1, keys that any of them may see) for each block of ``seen_TN``."""
    out = []
    for start in range(0, len(seen_TN), BLOCK):
        end = min(start + BLOCK, len(seen_TN))
        out.append((start, end, torch.from_numpy(np.flatnonzero(seen_TN[start:end].any(0))).to(device)))
    return out


@contextmanager
def in_blocks(config: Any, plan: Sequence[tuple[int, int, torch.Tensor]]) -> Iterator[None]:
    """Run models of ``config`` with ``plan``, where they use torch's scaled dot-product attention; others run as they are."""
    global _blocks
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation, _blocks = _NAME, plan
    try:
        yield
    finally:
        config._attn_implementation, _blocks = "sdpa", ()


def _attend(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BHND: torch.Tensor,
    value_BHND: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is None or not _blocks:
        return sdpa_attention_forward(module, query_BHTD, key_BHND, value_BHND, attention_mask, dropout, scaling, **kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    out = []
    for start, end, keys in _blocks:
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                query_BHTD[:, :, start:end],
                repeat_kv(key_BHND.index_select(2, keys), groups),
                repeat_kv(value_BHND.index_select(2, keys), groups),
                attn_mask=attention_mask[:, :, start:end].index_select(3, keys),
                scale=scaling,
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attend)
