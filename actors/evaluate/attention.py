"""Attention over a pack in blocks, and over a padded batch.

A pack's mask is mostly zero: tokens of different prompts that cannot see each other need not be multiplied either. Its queries are
cut into blocks, and each block meets only the keys that some token of it may see. A batch may be padded to a fixed number of rows
(see ``generate.py``) by copies of its first; only the rows before these have keys and values.

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
_BLOCKS, _ROWS = "comptrust_blocks", "comptrust_rows"
Plan = Sequence[tuple[int, int, torch.Tensor]]
_plan: Any = None


def blocks(seen_TN: np.ndarray, device: torch.device) -> Plan:
    """(first query, last + 1, keys that any of them may see) for each block of ``seen_TN``."""
    out = []
    for start in range(0, len(seen_TN), BLOCK):
        end = min(start + BLOCK, len(seen_TN))
        out.append((start, end, torch.from_numpy(np.flatnonzero(seen_TN[start:end].any(0))).to(device)))
    return out


def ours(config: Any) -> bool:
    """Whether models of ``config`` use torch's scaled dot-product attention, in whose place these functions step; Falcon calls its own."""
    return config._attn_implementation == "sdpa" and config.model_type != "falcon"


@contextmanager
def attending(config: Any, plan: Plan | int) -> Iterator[None]:
    """Run models of ``config`` with these blocks, or with keys for so many rows only; those that are not ``ours`` run as they are."""
    global _plan
    if not ours(config):
        yield
        return
    config._attn_implementation, _plan = _ROWS if isinstance(plan, int) else _BLOCKS, plan
    try:
        yield
    finally:
        config._attn_implementation, _plan = "sdpa", None


def _in_blocks(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BHND: torch.Tensor,
    value_BHND: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is None:
        return sdpa_attention_forward(module, query_BHTD, key_BHND, value_BHND, attention_mask, dropout, scaling, **kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    out = []
    for start, end, keys in _plan:
        keys = keys.to(key_BHND.device)  # layers may lie on several devices
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


def _in_rows(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_RHND: torch.Tensor,
    value_RHND: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    out_RTHD, _ = sdpa_attention_forward(module, query_BHTD[:_plan], key_RHND, value_RHND, *args, **kwargs)
    return torch.cat([out_RTHD, out_RTHD[:1].expand(len(query_BHTD) - _plan, -1, -1, -1)]), None


AttentionInterface.register(_BLOCKS, _in_blocks)
AttentionInterface.register(_ROWS, _in_rows)
