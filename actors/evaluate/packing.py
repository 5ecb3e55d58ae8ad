"""Prefill without padding and without doing any token twice.

Prompts are sorted by their token ids, so each shares its longest common prefix with the one before it. Only what follows that
prefix is computed: the new tokens of many prompts stand side by side in one row (a *pack*), and a mask lets each see its own
path from the root and nothing else. The first prompt of the next pack takes the keys and values it shares from the last.

Legend: T new tokens of a pack, P tokens of its base, S = P + T slots, B rows, H key-value heads, N slots of a row, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Pack:
    """Prompts computed in one forward. Slots 0..P-1 are the base, taken from slots ``base`` of the pack before."""

    base: np.ndarray
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    members: list[tuple[int, np.ndarray, int]] = field(default_factory=list)  # (index, slots of all its tokens, shared)

    @property
    def size(self) -> int:
        return len(self.tokens)

    def add(self, index: int, tokens: Sequence[int], prefix: np.ndarray) -> np.ndarray:
        """Append what follows ``prefix`` (slots of the shared tokens); returns the slots of the whole sequence."""
        shared, start = len(prefix), len(self.base) + self.size
        slots = np.concatenate([prefix, np.arange(start, start + len(tokens) - shared)])
        self.tokens += tokens[shared:]
        self.positions += range(shared, len(tokens))
        self.members.append((index, slots, shared))
        return slots

    def mask_TS(self) -> np.ndarray:
        """True where a new token may look: its own sequence up to itself."""
        base = len(self.base)
        mask_TS = np.zeros((self.size, base + self.size), dtype=bool)
        for _, slots, shared in self.members:
            own = slots[shared:]
            mask_TS[np.ix_(own - base, slots[:shared])] = True
            mask_TS[own[0] - base : own[-1] + 1 - base, own[0] : own[-1] + 1] = np.tri(len(own), dtype=bool)
        return mask_TS


def packs(sequences: Sequence[tuple[int, ...]], first: Sequence[int], budget: int) -> Iterator[Pack]:
    """Packs of at most ``budget`` new tokens (a longer sequence gets one of its own), in sorted order.

    ``first[i]`` is the first position of sequence i whose logits are needed: it and what follows is always computed anew.
    Sequences must differ from each other.
    """
    pack, before, slots = Pack(np.arange(0)), (), np.arange(0)
    for index in sorted(range(len(sequences)), key=sequences.__getitem__):
        tokens = sequences[index]
        shared = min(common_prefix(before, tokens), first[index])
        if pack.size and pack.size + len(tokens) - shared > budget:
            yield pack
            pack, slots = Pack(slots[:shared]), np.arange(shared)
        slots = pack.add(index, tokens, slots[:shared])
        before = tokens
    if pack.size:
        yield pack


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that are equal."""
    n = min(len(a), len(b))
    differ = np.asarray(a[:n]) != np.asarray(b[:n])
    return int(differ.argmax()) if differ.any() else n


@dataclass
class Ends:
    """Decoding: where each row's next token goes, and how many slots are in use. One for all layers of a cache."""

    lengths_B: torch.Tensor
    used: int


class Slots(CacheLayerMixin):
    """Keys and values of one layer, [B, H, N, D], in memory taken once.

    ``update`` writes behind the first ``filled`` slots; with ``ends``, one token behind the end of each row, and tokens of
    rows beyond B (copies) are dropped.
    """

    is_sliding = False

    def __init__(
        self, capacity: int, keys: torch.Tensor | None = None, values: torch.Tensor | None = None, filled: int = 0
    ) -> None:
        super().__init__()
        self.capacity, self.keys, self.values, self.filled = capacity, keys, values, filled
        self.is_initialized = keys is not None
        self.ends: Ends | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, _, size = key_states.shape
        self.keys = key_states.new_empty((rows, heads, self.capacity, size))
        self.values = value_states.new_empty((rows, heads, self.capacity, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.ends:
            rows_B = torch.arange(len(self.keys), device=self.keys.device)
            ends_B = self.ends.lengths_B.to(self.keys.device)  # layers may lie on several devices
            self.keys[rows_B, :, ends_B] = key_states[: len(rows_B), :, 0]
            self.values[rows_B, :, ends_B] = value_states[: len(rows_B), :, 0]
            return self.keys[:, :, : self.ends.used], self.values[:, :, : self.ends.used]
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # the name of get_max_length in earlier releases
        return -1


class SlotCache(Cache):
    """A cache of ``Slots``, one a layer."""

    def __init__(self, layers: list[Slots] | None = None, *, capacity: int = 0) -> None:
        if layers is None:
            super().__init__(layer_class_to_replicate=lambda: Slots(capacity))  # type: ignore[arg-type]
        else:
            super().__init__(layers=layers)  # type: ignore[arg-type]

    @classmethod
    def extend(cls, source: SlotCache | None, slots: np.ndarray, capacity: int) -> SlotCache:
        """One row that begins with ``slots`` of ``source`` and has room for ``capacity`` in all."""
        if source is None or not len(slots):
            return cls(capacity=capacity)
        return cls.gather([(source, 0, slots)], capacity)

    @classmethod
    def gather(cls, rows: Sequence[tuple[SlotCache, int, np.ndarray]], capacity: int) -> SlotCache:
        """A batch of (source, its row, its slots), each at the beginning of ``capacity`` slots. The rest is zero."""
        longest, layers = max(len(slots) for *_, slots in rows), []
        taken = [torch.from_numpy(slots) for *_, slots in rows]
        for i, like in enumerate(rows[0][0].layers):
            heads = like.keys.shape[1]
            keys = like.keys.new_zeros((len(rows), heads, capacity, like.keys.shape[3]))  # masked, but 0 x NaN is NaN
            values = like.values.new_zeros((len(rows), heads, capacity, like.values.shape[3]))
            if taken[0].device != keys.device:  # once, not a layer: layers may lie on several devices, one after the other
                taken = [slots.to(keys.device) for slots in taken]
            for r, ((source, row, _), index) in enumerate(zip(rows, taken, strict=True)):
                keys[r, :, : len(index)] = source.layers[i].keys[row].index_select(1, index)
                values[r, :, : len(index)] = source.layers[i].values[row].index_select(1, index)
            layers.append(Slots(capacity, keys, values, longest))
        return cls(layers)

    def at(self, lengths_B: torch.Tensor, used: int) -> SlotCache:
        """The same cache, whose next token goes behind slot ``lengths_B`` of each row."""
        ends = Ends(lengths_B, used)
        for layer in self.layers:
            layer.ends = ends
        return self

    @property
    def bytes_a_slot(self) -> int:
        """Of keys and values of one row, over all layers."""
        return sum(t[0, :, 0].nbytes for layer in self.layers for t in (layer.keys, layer.values))
