from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from comptrust.actors.evaluate.data import load_pack
from comptrust.actors.evaluate.protocol import Item
from comptrust.actors.evaluate.stereotype import TASK
from comptrust.actors.evaluate.suites import BLOCK, SIZES, rank, select
from hypothesis import given, settings
from hypothesis import strategies as st


def item(i: int, scenario: str, examples: str | None = None) -> Item:
    record = {"examples": [[examples, "yes"]]} if examples else {}
    return Item(f"item/{i}", "ethics", scenario, f"c{i}", record)


pools = st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from([None, "x", "y"])), max_size=60).map(
    lambda rows: [item(i, *row) for i, row in enumerate(rows)]
)


@given(pools, st.integers(1, 70), st.integers(1, 70))
@settings(deadline=None)
def test_smaller_is_contained_in_larger(pool, a, b):
    small, large = sorted((a, b))
    assert {i.id for i in select(pool, "smoke", small)} <= {i.id for i in select(pool, "full", large)}
    assert len(select(pool, "smoke", small)) == min(small, len(pool))


@given(pools, st.integers(1, 40), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_choice_does_not_depend_on_the_order_given(pool, n, random):
    shuffled = random.sample(pool, len(pool))
    chosen = {i.id for i in select(pool, "smoke", n)}
    assert {i.id for i in select(shuffled, "smoke", n)} == chosen
    assert [i.id for i in select(shuffled, "smoke", n)] == [i.id for i in shuffled if i.id in chosen]


@given(pools, st.integers(1, 40))
@settings(deadline=None)
def test_scenarios_take_turns(pool, n):
    have, took = Counter(i.scenario for i in pool), Counter(i.scenario for i in select(pool, "smoke", n))
    for a in have:
        for b in have:
            if took[a] < have[a]:  # a could have given more, so it is at most one turn behind
                assert took[b] <= took[a] + 1


def test_smallest_hash_first_and_blocks_share_examples():
    pool = [item(i, "s") for i in range(50)]
    first = {i.id for i in select(pool, "smoke")}
    by_hash = sorted((i.id for i in pool), key=lambda s: hashlib.sha1(s.encode()).hexdigest())
    assert first == set(by_hash[: SIZES["smoke"]])

    pool = [item(i, "s", f"demo {i % 10}") for i in range(100)]
    groups = Counter(str(i.record["examples"]) for i in select(pool, "smoke"))
    assert sorted(groups.values()) == [BLOCK] * (16 // BLOCK)


def test_golden():
    """Suites are part of every key: a change here makes every stored cell a stranger."""
    pool = [item(i, "abc"[i % 3], f"demo {i % 4}" if i % 2 else None) for i in range(40)]
    chosen = [i.id.removeprefix("item/") for i in select(pool, "smoke", 8)]
    assert chosen == ["2", "4", "6", "12", "14", "18", "32", "34"]
    assert rank("item/0") == "f3d6b1d72af50d885a6fc89539833e97ca2b6908"
    with pytest.raises(ValueError, match="tiny"):
        select(pool, "tiny")


def test_shipped_probes_fill_the_smoke_suite():
    chosen = select(TASK.items(load_pack("")), "smoke")
    assert len(chosen) == 16 and set(Counter(i.scenario for i in chosen).values()) == {5, 6}
