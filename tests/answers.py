"""Stored rows for a task's items from a function that plays the model."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise

from comptrust.actors.evaluate import TASKS, judge_many
from comptrust.actors.evaluate.data import load_pack
from comptrust.actors.evaluate.suites import select


@cache
def probes():
    """The built-in data pack, whatever COMPTRUST_DATA says."""
    return load_pack("")


def play(dimension, suite, answer, items=None):
    """Rows of table ``items`` as ``run.evaluate`` makes them, ``answer(item, sample)`` being the text."""
    task = TASKS[dimension]
    rows = []
    for item in select(task.items(probes()), suite) if items is None else items:
        for sample in range(task.decoding(item, suite).samples):
            rows.append(
                {
                    "dimension": item.dimension,
                    "scenario": item.scenario,
                    "item": item.id,
                    "sample": sample,
                    "cluster": item.cluster,
                    "target": json.loads(json.dumps(item.target)),
                    "finish_reason": "stop",
                    "text": answer(item, sample),
                }
            )
    judged = judge_many(task, [r["target"] for r in rows], [r["text"] for r in rows], [r["finish_reason"] for r in rows])
    return [{**r, "outcome": str(j.outcome), "score": j.score} for r, j in zip(rows, judged, strict=True)]


def value(metrics, metric, convention="comptrust", scenario=""):
    """The one metric of this name."""
    found = [m.value for m in metrics if (m.convention, m.metric, m.scenario) == (convention, metric, scenario)]
    assert len(found) == 1, f"{convention}/{scenario}/{metric}: {found}"
    return found[0]


def check_items(dimension):
    """What holds for the items of every task; returns them by scenario."""
    pack = probes()
    task = TASKS[dimension]
    items = task.items(pack)
    assert len(items) >= 48
    assert len({i.id for i in items}) == len(items)
    assert [i.id for i in task.items(pack)] == [i.id for i in items]
    for item in items:
        chat = task.messages(item)
        assert chat[-1].role == "user"
        assert all(a.role != b.role for a, b in pairwise(chat)), item.id
        assert all(m.role == "system" for m in chat[:1]) or chat[0].role == "user"
        assert item.dimension == dimension
        assert not any(isinstance(v, list | dict) and not v for v in item.target.values())
    by_scenario = {}
    for item in items:
        by_scenario.setdefault(item.scenario, []).append(item)
    return by_scenario
