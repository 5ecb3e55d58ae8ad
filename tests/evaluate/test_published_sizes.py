"""With the DecodingTrust pack (``COMPTRUST_DATA``): every scenario has the number of prompts that the papers state."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from comptrust.actors.evaluate import TASKS
from comptrust.actors.evaluate.data import load_pack

STYLES, TARGETS = 10, 12
SIZES = {
    "toxicity": {f"{s}/{t}": 1196 if s == "toxic" else 1200 for s in ("toxic", "nontoxic", "toxic-gpt3.5", "toxic-gpt4")
                 for t in ("benign", "adversarial")},
    "stereotype": dict.fromkeys(("benign", "untargeted", "targeted"), 24 * 16 * 3),
    "ood": {
        "knowledge": 2 * 263,
        "style": STYLES * 872,
        "knowledge_fewshot": TARGETS * 855,
        "style_fewshot": TARGETS * 872,
    },
    "demonstrations": {
        "counterfactual": 3 * (2 * 400 + 4 * 1000),
        "backdoor_asr": 4 * 3 * 3 * 428,
        "backdoor_cacc": 4 * 3 * 3 * 872,
    },
    "privacy": {"enron": 24 * 300, "pii": 12 * 3 * 100, "understanding": 8 * 17},  # this pack has 300 of the 3,294 targets
    "ethics": {"zero_shot": 2109, "few_shot": 2109, "jailbreak": 1000, "evasive": 1000},
}  # fmt: skip


if os.environ.get("COMPTRUST_DATA"):

    @pytest.mark.parametrize("dimension", SIZES)
    def test_sizes(dimension):
        items = TASKS[dimension].items(load_pack())
        assert Counter(i.scenario for i in items) == SIZES[dimension]
        assert len({i.id for i in items}) == len(items)

    def test_adversarial_names_its_source():
        scenarios = Counter(i.scenario for i in TASKS["adversarial"].items(load_pack()))
        assert scenarios.pop("advglue++/alpaca/sst2") == 444  # all that was recovered of AdvGLUE++
        assert set(scenarios) == {f"advglue-dev/{t}" for t in ("sst2", "qqp", "mnli", "mnli-mm", "qnli", "rte")}
        assert sum(scenarios.values()) == 738

    def test_fairness_configurations():
        items = TASKS["fairness"].items(load_pack())
        sizes = Counter(i.target["config"] for i in items)
        assert all(n == (300 if c.startswith("crime") else 200) for c, n in sizes.items())
        assert len(sizes) == 11
        # in the published crime files label, sensitive attribute and the share of whites in the text are one and the same
        crime = [i.target for i in items if i.target["dataset"] == "crime"]
        assert all(t["sensitive"] == t["label"] == (t["group"] == "white large") for t in crime)
        assert Counter(t["label"] for t in crime) == {1: 540, 0: 360}

    def test_mmlu_has_57_subjects():
        items = TASKS["mmlu"].items(load_pack())
        assert len(items) == 14042
        assert len({i.scenario for i in items}) == 57
        assert all(len(i.record["dev"]) == 5 for i in items)

    def test_every_chat_template_can_render_the_prompts():
        for name, task in TASKS.items():
            for item in task.items(load_pack())[::97]:
                chat = task.messages(item)
                roles = [m.role for m in chat if m.role != "system"]
                assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], (name, item.id)
