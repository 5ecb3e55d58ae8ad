"""Our scorers against the official ones: every case under ``COMPTRUST_PARITY`` to 1e-9, none skipped.

A case is one line of ``cases.jsonl`` (dimension, scenario, variant = convention, input file, expected values). ``SCORERS``
holds one function a dimension; a case without one, or an expected key that it does not return, fails.
"""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from comptrust.actors.evaluate import adversarial, demonstrations, ethics, fairness, ood, privacy, stereotype, toxicity
from comptrust.actors.evaluate.strings import STRINGS

ROOT = Path(os.environ["COMPTRUST_PARITY"]) if os.environ.get("COMPTRUST_PARITY") else None
CASES = [json.loads(line) for line in (ROOT / "cases.jsonl").open(encoding="utf-8")] if ROOT else []


@cache
def inputs(name):
    paths = sorted(ROOT.glob(name))
    assert paths, f"{name}: no such input"
    return {p.name: [json.loads(line) for line in gzip.open(p, "rt", encoding="utf-8")] for p in paths}


def score_stereotype(case, files):
    (rows,) = files.values()
    convention = case["variant"]
    groups = {t: i for i, t in enumerate(STRINGS["stereotype"]["groups"])}
    labels = {}
    for r in rows:
        said = stereotype.CLASSIFY[convention](r["output"])
        assert said == r["label_" + convention.replace("-", "_")], r["output"]
        # row = 3 * group + phrasing within a topic; the topics repeat for each system prompt
        group = list(groups)[r["row"] // 3]
        labels.setdefault(r["sys_prompt_type"], {}).setdefault((group, r["topic"]), []).append(said)
    assert all(len(v) == 3 * case["n_gens"] for cells in labels.values() for v in cells.values())
    return stereotype.aggregate(labels)


def score_ethics(case, files):
    (rows,) = files.values()
    runs = {}
    for r in rows:
        part = r["scenario"].split("_")  # few_shot_<shots>_test_num<n>_jailbreak_<j>_evasive_<e>
        shots, jailbreak, evasive = part[2], part[6], part[8]
        key = ("few_shot", "") if shots != "0" else ("jailbreak", jailbreak) if jailbreak != "0" else ("evasive", evasive)
        if key == ("evasive", "0"):
            key = ("zero_shot", "")
        runs.setdefault(key, []).append(r)
    measured = {}
    for (part, number), rs in runs.items():
        answers = [ethics.parse(r["response"], "</s>" if number else "<") for r in rs]
        measured[part, number] = ethics.rates(answers, [r["label"] for r in rs], case["variant"])
    return ethics.aggregate(measured)


def score_advglue(case, files):
    (rows,) = files.values()
    cells = {}
    for r in rows:
        predicted = adversarial.parse(r["response"], r["task"])
        assert predicted == r["prediction"], r["response"]
        cell = cells.setdefault(f"{r.get('base_model', 'alpaca')}/{r['task']}", ([], []))
        cell[0].append(predicted)
        cell[1].append(r["label"])
    out = adversarial.summary(cells)
    if case["scenario"] != "aggregate":
        return out
    model = next(iter(case["expected"]["breakdown"]))
    # Transferability is 1 - accuracy, TaskDataCount rows a cell, HasDemo the run's own setting (demonstrations: true)
    extra = {"Transferability": 1 - out["Accuracy"], "TaskDataCount": len(rows) / len(cells), "HasDemo": 1.0}
    summary = {k: {model: v} for k, v in {**out, **extra}.items() if k != "breakdown"}
    return {"summary": summary, "breakdown": {model: {t: {"acc": a} for t, a in out["breakdown"].items()}}}


@cache
def demonstration_runs(name):
    runs = {}
    for file, rows in inputs(name).items():
        scenario = file.split(".")[-3]
        for r in rows:
            key = (demonstrations.part_of(scenario, r["config"]), r["config"], r["seed"])
            run = runs.setdefault(key, ([], []))
            run[0].append(r["response"])
            run[1].append(r["label"])
    return {k: demonstrations.accuracy(*run) for k, run in runs.items()}


def score_demonstrations(case, files):
    runs = demonstration_runs(case["input_file"])
    if case["scenario"] != "aggregate":
        part = demonstrations.part_of(case["scenario"], case["config"])
        return runs[part, case["config"], case["seed"]]
    scored = {k: v for k, v in runs.items() if k[0] != demonstrations.COUNTERFACTUAL or k[1].endswith("_cf")}
    return demonstrations.aggregate(scored)


@cache
def ood_runs(name):
    (rows,) = inputs(name).values()
    runs = {}
    for r in rows:
        runs.setdefault(r["key"], []).append(r)
    out = {}
    for key, rs in runs.items():
        texts, labels = [r["response"] for r in rs], [r["label"] for r in rs]
        if "choices" in rs[0]:
            out[key] = ood.score_knowledge(texts, labels, [r["choices"] for r in rs])
        else:
            out[key] = ood.score_style(texts, labels)
    return out


def score_ood(case, files):
    runs = ood_runs(case["input_file"])
    return ood.aggregate(runs) if case["scenario"] == "aggregate" else runs[case["key"]]


def grouped(rows, *keys):
    groups = {}
    for r in rows:
        groups.setdefault(tuple(r[k] for k in keys), []).append(r)
    return groups


@cache
def privacy_counts(name):
    counts = {}
    for file, rows in inputs(name).items():
        part = file.split(".")[-3]
        for (mode,), rs in grouped(rows, "topic" if part == "understanding" else "mode").items():
            texts = [r["continuation"] for r in rs]
            if part == "enron":
                counts[part, mode] = privacy.score_enron(texts, [r["gt-email"] for r in rs])
            elif part == "pii":
                counts[part, mode] = privacy.score_pii(texts, [r["gt"] for r in rs])
            else:
                words = {
                    w: privacy.score_understanding([r["continuation"] for r in g]) for (w,), g in grouped(rs, "word").items()
                }
                counts[part, mode] = {
                    **privacy.score_understanding(texts),
                    "leak_by_word": {w: c["correct"] for w, c in words.items()},
                    "reject_by_word": {w: c["reject"] for w, c in words.items()},
                }
    return counts


def score_privacy(case, files):
    counts = privacy_counts(case["input_file"])
    if case["scenario"] != "aggregate":
        return counts[case["scenario"], case["config"]]
    # The official file names are the types without blanks; other spellings (SSN, Social-Security-Number) are not read.
    scored = {f"{t.replace(' ', '')}_{mode}" for t in privacy.PII_TYPES for mode in privacy.PII_MODES}
    parts = {"enron": [], "pii": [], "understanding": []}
    for (part, mode), c in counts.items():
        if part != "pii" or mode in scored:
            parts[part].append(c)
    return privacy.aggregate(**parts)


@cache
def fairness_blocks(name, convention):
    (rows,) = inputs(name).values()
    configs = {c: rs for (c,), rs in grouped(rows, "config").items()}
    flip = np.random.RandomState(0).uniform  # one stream through all configurations, as in the official run
    blocks, known = {}, {}
    for config in fairness.CONFIGS:
        rs = configs[config]
        dataset = "crime" if config.startswith("crime") else "adult"
        predictions = [fairness.parse(r["response"], dataset, flip) for r in rs]
        known[config] = sum(p is not None for p in predictions)
        labels = [int(r["label"] in ("yes", "Low")) for r in rs]
        blocks[config] = fairness.block(predictions, labels, [r["sensitive"] for r in rs], convention)
    return blocks, known


def score_fairness(case, files):
    blocks, known = fairness_blocks(case["input_file"], case["variant"])
    if case["scenario"].startswith("aggregate"):
        return fairness.aggregate(blocks, known, case["variant"])
    return blocks[case["scenario"]]


def score_toxicity(case, files):
    (rows,) = files.values()
    if case["scenario"].startswith("toxic,"):
        rejected = [toxicity.rejects(r["continuation"]) for r in rows]
        assert rejected == [r["is_rejected"] for r in rows]
        return {"rejection_rate": np.mean(rejected)}
    gens = [r["gens"] for r in rows]
    return {
        "expected_max_toxicity": toxicity.expected_max([[g["toxicity"] for g in gs] for gs in gens]),
        "rejection_rate": np.mean([g["is_rejected"] for gs in gens for g in gs]),
    }


SCORERS = {
    "toxicity": score_toxicity,
    "fairness": score_fairness,
    "privacy": score_privacy,
    "adv_demonstration": score_demonstrations,
    "ood": score_ood,
    "advglue": score_advglue,
    "stereotype": score_stereotype,
    "machine_ethics": score_ethics,
}


def assert_equal(got, expected, where):
    if isinstance(expected, dict):
        for key, value in expected.items():
            if key in ("dataset", "model"):  # names, not scores
                continue
            assert key in got, f"{where}: no {key}"
            assert_equal(got[key], value, f"{where}/{key}")
    elif isinstance(expected, int | float) and not isinstance(expected, bool):
        assert got == pytest.approx(expected, rel=0, abs=1e-9), where
    else:
        assert got == expected, where


@pytest.mark.parametrize("case", CASES, ids=[c["case_id"] for c in CASES])
def test_official(case):
    files = inputs(case["input_file"])
    scorer = SCORERS[case["dimension"]]
    if "error" in case["expected"]:
        kind = {"ValueError": ValueError}[case["expected"]["error"].split("(")[0]]
        with pytest.raises(kind):
            scorer(case, files)
        return
    assert_equal(scorer(case, files), case["expected"], case["case_id"])
