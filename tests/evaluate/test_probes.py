"""The shipped probe items: whole, balanced, right in what can be checked, and nobody's data."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from importlib.resources import files
from pathlib import Path

import pytest
from comptrust.actors.evaluate import TASKS
from comptrust.actors.evaluate.data import FIELDS, Pack
from comptrust.actors.evaluate.suites import select

PACK = Pack(Path(str(files("comptrust.actors.data") / "probes")), "builtin")
ITEMS = {name: list(task.items(PACK)) for name, task in TASKS.items()}


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for v in value.values() if isinstance(value, dict) else value:
            yield from strings(v)


@pytest.mark.parametrize("name", TASKS)
def test_every_dimension_has_enough_items_and_prompts(name):
    items = ITEMS[name]
    assert len(items) >= 48
    assert len({i.id for i in items}) == len(items)
    for item in items:
        messages = TASKS[name].messages(item)
        assert messages[-1].role == "user"
        assert all(m.content.strip() for m in messages)


@pytest.mark.parametrize("name", TASKS)
def test_smoke_suite_touches_every_scenario_and_more_than_one_label(name):
    smoke = select(ITEMS[name], "smoke")
    assert {i.scenario for i in smoke} == {i.scenario for i in ITEMS[name]}
    labels, known = defaultdict(set), defaultdict(set)
    for found, items in ((labels, smoke), (known, ITEMS[name])):
        for i in items:
            if "label" in i.target:
                found[i.scenario].add(i.target["label"])
    assert all(len(labels[s]) >= min(2, len(known[s])) for s in known)


def count(name, *keys, of=lambda r: True):
    return Counter(tuple(r[k] for k in keys) for r in PACK.records(name) if of(r))


def test_labels_are_balanced():
    for name, keys, of in (
        ("machine_ethics", ("label",), lambda r: r["role"] == "test"),
        ("machine_ethics", ("label",), lambda r: r["role"] != "test"),
        ("advglue", ("label",), lambda r: r["task"] == "sst2"),
        ("advglue", ("label",), lambda r: r["task"] == "mnli"),
        ("advglue", ("label",), lambda r: r["task"] == "qqp"),
        ("ood", ("category", "label"), lambda r: r["task"] == "style"),
        ("ood", ("category", "answer"), lambda r: r["task"] == "knowledge" and r["role"] == "test"),
        ("adv_demonstration", ("label",), lambda r: r["scenario"] == "spurious"),
        ("fairness", ("config", "gt"), lambda r: True),
        ("fairness", ("config", "sensitive"), lambda r: True),
        ("mmlu", ("answer",), lambda r: r["split"] == "test"),
        ("toxicity", ("split",), lambda r: True),
        ("stereotype", ("group",), lambda r: True),
        ("stereotype", ("topic",), lambda r: True),
        ("privacy_pii", ("pii", "mode"), lambda r: True),
    ):
        assert len(set(count(name, *keys, of=of).values())) == 1, (name, keys, count(name, *keys, of=of))


def test_all_configurations_are_there():
    configs = {r["config"] for r in PACK.records("adv_demonstration")}
    assert len([c for c in configs if c.endswith("_cf")]) == 6
    assert len([c for c in configs if "-bias" in c]) == 12
    assert len([c for c in configs if c.endswith("_asr")]) == len([c for c in configs if c.endswith("_cacc")]) == 12
    assert len({r["config"] for r in PACK.records("fairness")}) == 11
    assert len({r["topic"] for r in PACK.records("privacy_understanding")}) == 8
    dev = count("mmlu", "subject", of=lambda r: r["split"] == "dev")
    assert set(dev.values()) == {5}
    assert set(dev) == set(count("mmlu", "subject"))


def test_base_rates_of_the_adult_configurations():
    """The share of positives among men minus that among women is what the name of the configuration says."""
    for config, gap in {"zero_shot_br_0.0": 0, "zero_shot_br_0.5": 0.5, "zero_shot_br_1.0": 1, "few_shot_tr_br_1.0": 0}.items():
        rows = [r for r in PACK.records("fairness") if r["config"] == config]
        share = {s: [r["gt"] for r in rows if r["sensitive"] == s] for s in ("Male", "Female")}
        assert sum(share["Male"]) / len(share["Male"]) - sum(share["Female"]) / len(share["Female"]) == gap
        assert all(f"sex {r['sensitive']}," in r["input"] for r in rows)


def test_spurious_hypotheses_lie_inside_their_premises():
    """Every word of the hypothesis is in the premise, so overlap alone can't tell the label (passive: but for verb forms)."""
    for r in PACK.records("adv_demonstration"):
        if r["scenario"] == "spurious" and not r["config"].startswith("passive"):
            premise, hypothesis = re.fullmatch(r"premise: (.*)\nhypothesis: (.*)\nanswer:", r["input"]).groups()
            assert set(re.findall(r"\w+", hypothesis.lower())) <= set(re.findall(r"\w+", premise.lower())), r["id"]


def test_a_counterfactual_twin_has_another_label_and_is_near():
    for r in PACK.records("adv_demonstration"):
        if r["scenario"] == "counterfactual":
            twin, label = r["last_demo"]
            assert label != r["label"]
            assert label in r["option"]
            same = len(set(twin.split()) & set(r["input"].split())) / len(set(r["input"].split()))
            assert same > 0.4, r["id"]


def test_triggers_are_where_they_belong():
    for r in PACK.records("adv_demonstration"):
        if r["scenario"] == "backdoor":
            marks = {"badword": r"\bcf\b", "addsent": "i saw it on a rainy tuesday"}
            if kind := next((k for k in marks if k in r["config"]), None):
                assert bool(re.search(marks[kind], r["input"])) == r["config"].endswith("_asr"), r["id"]


def test_personal_data_are_invented():
    for name in PACK.names:
        for text in strings(PACK.records(name)):
            for address in re.findall(r"[\w.+-]+@([\w.-]+\.\w+)", text):
                assert re.search(r"(^|\.)example(\.(com|org|net))?$", address), address  # reserved by RFC 2606
            assert not re.search(r"https?://(?!example\.(com|org|net)\b)", text), text
    for r in PACK.records("privacy_pii"):
        told = [m["content"] for m in r["messages"] if m["role"] == "user"]
        assert told[0].count(r["gt"]) == 1
        assert not any(r["gt"] in m["content"] for m in r["messages"][1:])
        if r["pii"] == "phone number":
            assert "-555-01" in r["gt"]  # reserved for fiction
        if r["pii"] in ("ssn", "social security number"):
            assert r["gt"][0] == "9" or r["gt"].startswith("000")  # never issued
        if r["pii"] == "credit card number":
            digits = [int(d) for d in r["gt"].replace(" ", "")]
            doubled = [d if k % 2 else sum(divmod(2 * d, 10)) for k, d in enumerate(digits)]
            assert sum(doubled) % 10  # fails the Luhn check: no card


def test_no_item_of_the_research_pack_is_inside():
    """Original texts: no shipped sentence is one of the pack's (checked where the pack is at hand)."""
    folder = os.environ.get("COMPTRUST_DATA")
    theirs = Pack(Path(folder), "pack") if folder and Path(folder).is_dir() else None
    for name in FIELDS:
        mine = {t.strip().lower() for r in PACK.records(name) for t in strings(r) if len(t.split()) > 6}
        for record in theirs.records(name) if theirs else ():
            assert not mine & {t.strip().lower() for t in strings(record)}


def test_plain_data_and_small():
    folder = files("comptrust.actors.data") / "probes"
    lines = [line for f in folder.iterdir() for line in f.read_text(encoding="utf-8").splitlines()]
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert sum(len(line) for line in lines) < 1_000_000
