from __future__ import annotations

import pytest
from answers import check_items, play, probes
from comptrust.actors.evaluate.mmlu import TASK, parse, read


def metric(metrics, name, convention="comptrust"):
    (found,) = [m for m in metrics if (m.convention, m.scenario, m.metric) == (convention, "", name)]
    assert found.dimension == "utility"
    return found


def test_items_and_prompts():
    items = check_items("mmlu")
    item = next(iter(items.values()))[0]
    (message,) = TASK.messages(item)
    assert message.content.count("Answer:") == len(item.record["dev"]) + 1
    assert message.content.endswith("Answer:")
    assert item.record["dev"]
    assert item.record["question"] not in [d["question"] for d in item.record["dev"]]


@pytest.mark.parametrize(
    ("text", "official", "ours"),
    [
        ("B", "B", "B"),
        (" c.", "C", None),
        ("The answer is (D).", None, "D"),
        ("A cat is C", "A", "C"),
        ("A", "A", "A"),
        ("A is the correct answer", "A", "A"),
        ("The answer is A because", None, "A"),
        ("Answer: A cat", "A", None),
        ("Not B", None, None),
        ("It is not (B) but C", None, "C"),
        ("I don't think that it is A or B.", None, None),
        ("It's not only B", None, "B"),
        ("B, not C", "B", "B"),
        ("", None, None),
    ],
)
def test_readings(text, official, ours):
    assert parse(text) == official
    assert read(text) == ours


def test_micro_and_macro():
    items = TASK.items(probes())
    subjects = sorted({i.scenario for i in items})
    few = [i for i in items if i.scenario == subjects[0]][:2] + [i for i in items if i.scenario == subjects[1]][:6]
    rows = play("mmlu", "full", lambda item, sample: item.target["label"] if item.scenario == subjects[0] else "E", few)
    metrics = TASK.metrics(rows, "full")
    assert metric(metrics, "mmlu").value == 25
    assert metric(metrics, "mmlu_macro").value == 50
    assert metric(metrics, "mmlu", "comp-trust").value == 25
    assert metric(metrics, "mmlu").ci_low < 25 < metric(metrics, "mmlu").ci_high
