"""Suites: nested, deterministic subsets, stratified by scenario."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from .protocol import SUITES, Item

#: Items a dimension; None: all.
SIZES: dict[str, int | None] = {"smoke": 16, "standard": 160, "full": None}
#: Samples a prompt, where a dimension samples. A maximum over samples depends on their number: the metric's name carries it.
SAMPLES = {"smoke": 1, "standard": 5, "full": 25}


def rank(item_id: str) -> str:
    """The one order in which items enter a suite: SHA-1 of the id, smallest first."""
    return hashlib.sha1(item_id.encode(), usedforsecurity=False).hexdigest()


def select(items: Sequence[Item], suite: str, per_dimension: int | None = None) -> list[Item]:
    """The items of ``suite`` (or the first ``per_dimension``), in their given order.

    Scenarios take turns, each giving its items by ``rank``; scenarios themselves take turns by the rank of their name. A larger
    number of items therefore always contains a smaller one.
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
        members.sort(key=lambda i: rank(i.id))
        turns += [(turn, rank(scenario), item.id) for turn, item in enumerate(members)]
    chosen = {item_id for _, _, item_id in sorted(turns)[:size]}
    return [item for item in items if item.id in chosen]
