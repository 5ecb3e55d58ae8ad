"""Suites: nested, deterministic subsets, stratified by scenario."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from .protocol import SUITES, Item

#: Items a dimension; None: all.
SIZES: dict[str, int | None] = {"smoke": 16, "standard": 160, "full": None}
#: Samples a prompt, where a dimension samples. A maximum over samples depends on their number: the metric's name carries it.
SAMPLES = {"smoke": 1, "standard": 5, "full": 25}
#: Items with the same few-shot examples are taken so many at a time: their prompts share a prefix that costs more than they do.
BLOCK = 4


def rank(item_id: str) -> str:
    """The one order in which items enter a suite: SHA-1 of the id, smallest first."""
    return hashlib.sha1(item_id.encode(), usedforsecurity=False).hexdigest()


def select(items: Sequence[Item], suite: str, per_dimension: int | None = None) -> list[Item]:
    """The items of ``suite`` (or the first ``per_dimension``), in their given order.

    Scenarios take turns, by the rank of their name. A scenario gives its items by rank, in blocks of four that share their
    few-shot examples, those without examples first. One order for all sizes: a larger suite always contains a smaller one.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    size = SIZES[suite] if per_dimension is None else per_dimension
    if size is None or size >= len(items):
        return list(items)
    strata: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        strata[item.scenario].append(item)
    turns = []
    for scenario, members in strata.items():
        seen: Counter[str] = Counter()
        blocks = []
        for item in sorted(members, key=lambda i: rank(i.id)):
            examples = item.record.get("examples") or ()
            group = rank(str(examples[0])) if examples else ""
            blocks.append((seen[group] // BLOCK, group, seen[group], item.id))
            seen[group] += 1
        turns += [(turn, rank(scenario), item_id) for turn, (*_, item_id) in enumerate(sorted(blocks))]
    chosen = {item_id for _, _, item_id in sorted(turns)[:size]}
    return [item for item in items if item.id in chosen]
