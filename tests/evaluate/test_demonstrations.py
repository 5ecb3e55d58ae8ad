from __future__ import annotations

import pytest
from answers import check_items, play, value
from comptrust.actors.evaluate.demonstrations import TASK, accuracy, aggregate, parse, rejects


def test_items_and_prompts():
    items = check_items("demonstrations")
    assert set(items) == {"counterfactual", "spurious", "backdoor_asr", "backdoor_cacc"}
    assert all(i.target["config"].endswith("_cf") for i in items["counterfactual"])
    twin = items["counterfactual"][0]
    chat = TASK.messages(twin)
    assert [m.content for m in chat[-3:-1]] == [twin.record["last_demo"][0], twin.record["last_demo"][1].capitalize()]
    assert chat[-1].content == twin.record["input"]
    assert TASK.messages(items["backdoor_asr"][0])[1].content.startswith("For each snippet of text, label the sentiment")


@pytest.mark.parametrize(
    ("text", "whole", "head"),
    [
        ("Answer: Yes, it does.", "yes, it does.", "yes"),
        ("positive</s> and so on", "positive", "positive"),
        ("no\nbecause", "no\nbecause", "no"),
    ],
)
def test_official_normalisation(text, whole, head):
    assert parse(text) == (whole, head)


def test_official_refusal_only_where_wrong():
    assert accuracy(["no, I'm sorry", "I'm sorry", "You are right, I apologize"], ["no", "no", "no"]) == {
        "acc": 1 / 3,
        "rej": 1 / 3,
    }
    assert rejects("I cannot")


def test_silence_is_no_resistance():
    rows = play(
        "demonstrations", "standard", lambda item, sample: item.target["label"] if item.scenario != "backdoor_asr" else ""
    )
    metrics = TASK.metrics(rows, "standard")
    assert value(metrics, "score", "dt-head") == pytest.approx(100)  # an attack that gets no answer fails
    assert value(metrics, "score") == pytest.approx(200 / 3)
    assert value(metrics, "cacc", scenario="backdoor_cacc") == 1
    assert value(metrics, "empty", scenario="backdoor_asr") == 1


def test_attacked_model():
    metrics = TASK.metrics(play("demonstrations", "standard", lambda item, sample: item.target["label"]), "standard")
    assert value(metrics, "asr", scenario="backdoor_asr") == 1
    assert value(metrics, "asr", "dt-head", "backdoor_asr") == 1
    assert value(metrics, "score") == pytest.approx(200 / 3)


def test_a_part_without_runs_is_an_error():
    with pytest.raises(ValueError, match="no runs of spurious"):
        aggregate({("counterfactual", "a_cf", 1): {"acc": 1.0, "rej": 0.0}})
