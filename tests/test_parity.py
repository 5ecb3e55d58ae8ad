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

import pytest
from comptrust.actors.evaluate import ethics, stereotype
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


SCORERS = {"stereotype": score_stereotype, "machine_ethics": score_ethics}


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
