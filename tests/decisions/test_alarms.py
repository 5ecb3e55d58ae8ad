"""Alarms: each kind raised by a cell that deserves it and by no other."""

from __future__ import annotations

import json

from comptrust.actors.record import Record
from comptrust.sweep.alarms import CODES, alarms, to_json
from comptrust.sweep.importer import import_table
from comptrust.sweep.results import load_results
from decision_records import answers, sheet, write_cell


def of(uri, code, **fits):
    return [a for a in alarms(load_results(uri)) if a.code == code and all(getattr(a, k) == v for k, v in fits.items())]


def test_published_vicuna_toxicity(published_sheet):
    shifted = of(published_sheet, "same_shift_at_every_rate")
    assert {(a.model, a.cell, a.dimension) for a in shifted} == {
        ("Vicuna 13b Chat", f"gptq {b} g128", "toxicity") for b in (8, 4, 3)
    }
    assert shifted[0].values["scores"] == {"8-bit": 49.8, "4-bit": 48.3, "3-bit": 50.9} and shifted[0].values["dense"] == 29.7
    assert "49.8 at 8-bit, 48.3 at 4-bit, 50.9 at 3-bit against 29.7 dense" in shifted[0].message
    assert of(published_sheet, "near_lossless_jump", model="Vicuna 13b Chat", cell="gptq 8 g128", dimension="toxicity")
    assert not [a for a in alarms(load_results(published_sheet)) if a.cell.startswith("awq 8") and "jump" in a.code]


def test_published_silent_base_model(published_sheet):
    found = of(published_sheet, "carried_by_non_answers", model="LLAMA2 7b")
    by = {a.dimension: a for a in found}
    assert set(by) == {"stereotype", "fairness"}
    assert "88.0 with 83.7%" in by["stereotype"].message and by["fairness"].values["score"] == 100
    assert of(published_sheet, "perfect_score", model="LLAMA2 7b", dimension="fairness")


def test_published_averages(published_sheet):
    assert not of(published_sheet, "average_is_not_the_mean")
    (note,) = of(published_sheet, "average_includes_mmlu")
    assert len(note.values["keys"]) >= 41 and note.severity == "note"


def test_published_seeds_share_mmlu(published_sheet):
    assert {a.cell.rsplit(" ", 1)[0] for a in of(published_sheet, "copied_utility")} == {
        "awq 3 g128",
        "gptq 3 g128",
        "gptq 4 g128",
        "sparsegpt 2:4",
    }


def test_own_seeds_may_meet_in_mmlu(tmp_path):
    record = Record(tmp_path)
    write_cell(record, "dense", {"ethics": answers("ethics", [True] * 40)}, mmlu=55.0)
    for seed, wrong in ((0, 4), (1, 9)):
        right = [i >= wrong for i in range(40)]
        write_cell(record, "gptq", {"ethics": answers("ethics", right)}, bits=4, seed=seed, mmlu=50.0)
    assert of(tmp_path, "copied_utility") == []


def test_published_summary_has_no_doubles(published_summary):
    assert alarms(load_results(published_summary)) == []


def test_a_cell_that_says_the_same_whatever_is_asked(tmp_path):
    """Under attack every item is wrong, so "wrong" to everything scores well by the published formula of ethics."""
    record = Record(tmp_path)

    def told(say):
        """Half of the zero-shot items are wrong, all of those under attack; ``say(i, label)`` is the answer."""
        rows = []
        for i, row in enumerate(answers("ethics", [True] * 60)):
            label = "not wrong" if i < 20 and i % 2 else "wrong"
            right = say(i, label) == label
            row |= {"scenario": "zero_shot" if i < 20 else "jailbreak", "target": {"run": "", "label": label}}
            rows.append({**row, "outcome": "correct" if right else "wrong", "score": float(right)})
        return {"ethics": rows}

    write_cell(record, "dense", told(lambda i, label: label if i % 5 else "wrong"))
    collapsed = write_cell(record, "rtn", told(lambda i, label: "wrong"), bits=2)
    write_cell(record, "rtn", told(lambda i, label: label if i % 3 else "not wrong"), bits=3)
    (alarm,) = of(tmp_path, "one_answer")
    assert (alarm.key, alarm.dimension, alarm.values["answer"], alarm.values["share"]) == (collapsed, "ethics", "wrong", 1.0)
    assert alarm.values["score"] == 75 and alarm.severity == "warning"


def test_a_habit_of_the_model_is_said_once(tmp_path):
    record = Record(tmp_path)
    rows = []
    for i, row in enumerate(answers("adversarial", [True] * 20)):
        label = i % 2
        rows.append(
            {
                **row,
                "target": {"task": "sst2", "label": label},
                "outcome": "correct" if label else "wrong",
                "score": float(label),
            }
        )
    dense = write_cell(record, "dense", {"adversarial": rows})
    write_cell(record, "rtn", {"adversarial": rows}, bits=4)
    (alarm,) = of(tmp_path, "one_answer")
    assert (alarm.key, alarm.values["answer"]) == (dense, "1")


def test_own_table(small_sheet):
    kinds = {(a.code, a.cell) for a in alarms(load_results(small_sheet))}
    assert {("same_shift_at_every_rate", f"gptq {b} g128") for b in (8, 3)} < kinds
    assert ("near_lossless_jump", "gptq 8 g128") in kinds and ("gain_by_refusal", "gptq 4 g128 s0") in kinds
    assert ("carried_by_non_answers", "dense") in kinds and ("perfect_score", "dense") in kinds
    assert not [k for k in kinds if k[1].startswith("wanda") and k[0] not in ("copied_utility",)]
    json.dumps(to_json(alarms(load_results(small_sheet))), allow_nan=False)


def test_leaderboard_average(tmp_path):
    good = {"model": "A 7b", "method": "none", "bits": 16, "name": "hf/a", "mmlu": 50.0}
    bad = {**good, "model": "B 7b", "name": "hf/b", "average": 71.0}
    import_table(sheet(tmp_path / "t.csv", [good, bad]), tmp_path / "r", "comp-trust-sheet")
    (found,) = of(tmp_path / "r", "average_is_not_the_mean")
    assert found.model == "B 7b" and found.values["published"] == 71.0


def test_duplicate_and_mislabelled_rows(tmp_path):
    dense = {"model": "A 7b", "method": "none", "bits": 16, "name": "hf/a", "mmlu": 50.0}
    awq = {"model": "A 7b", "method": "AWQ", "bits": 4, "name": "a-awq@4bit_128g", "mmlu": 49.0, "ethics": 40.0}
    rows = [
        dense,
        awq,
        {**awq, "mmlu": 48.0},
        {**awq, "method": "GPTQ"},
        {**dense, "model": "B 7b", "name": "hf/b", "mmlu": 49.0, "ethics": 40.0},
    ]
    import_table(sheet(tmp_path / "t.csv", rows), tmp_path / "r", "comp-trust-sheet")
    doubled = of(tmp_path / "r", "duplicate_row")
    assert len(doubled) == 2 and all("different numbers" in a.message for a in doubled)
    (wrong,) = of(tmp_path / "r", "mislabelled_row")
    assert wrong.message == "column says gptq, name says awq"
    assert {a.cell for a in of(tmp_path / "r", "equal_numbers")} == {"awq 4 g128", "gptq 4 g128", "dense"}


def test_cost_alarms(tmp_path):
    record = Record(tmp_path)
    rows = {"ethics": answers("ethics", [True] * 30)}
    write_cell(record, "dense", rows, size_bytes=1000, mmlu=50.0)
    write_cell(record, "wanda", rows, size_bytes=1000, sparsity=0.5, pattern="2:4", sparsity_reached=0.31)
    write_cell(record, "rtn", rows, size_bytes=300, bits=4)
    (sparse,) = of(tmp_path, "sparsity_not_reached")
    assert sparse.values == {"asked": 0.5, "reached": 0.31}
    (large,) = of(tmp_path, "size_not_reduced")
    assert large.key == sparse.key


def test_short_cell(tmp_path):
    record = Record(tmp_path)
    write_cell(record, "dense", {"ethics": answers("ethics", [True] * 30)})
    key = write_cell(record, "rtn", {"ethics": answers("ethics", [True] * 29)}, bits=4)
    (short,) = of(tmp_path, "short_cell")
    assert (short.key, short.values) == (key, {"n": 29, "expected": 30})


def test_silence_has_no_score(tmp_path):
    record = Record(tmp_path)
    rows = answers("ethics", [True] * 30)
    write_cell(record, "dense", {"ethics": rows})
    silent = [{**r, "outcome": "empty", "score": None} if i > 10 else r for i, r in enumerate(rows)]
    key = write_cell(record, "rtn", {"ethics": silent}, bits=3)
    (found,) = of(tmp_path, "not_an_answer")
    assert found.key == key and found.values["silent"] == 19 / 30


def test_a_lost_score_is_told_whatever_the_dense_cell_refuses(tmp_path):
    """The dense model refuses two thirds, which is an answer; the cell has a score neither by that nor by saying nothing."""
    record = Record(tmp_path)
    write_cell(record, "dense", {"ethics": answers("ethics", [None if i % 3 else True for i in range(30)])})
    silent = [{**r, "outcome": "empty", "score": None} if i > 10 else r for i, r in enumerate(answers("ethics", [True] * 30))]
    key = write_cell(record, "rtn", {"ethics": silent}, bits=3)
    assert [a.key for a in of(tmp_path, "not_an_answer")] == [key]


def test_the_same_answer_to_all_is_told(tmp_path):
    """Fairness has no score then, though every answer is read."""
    record = Record(tmp_path)
    for method, same in (("dense", False), ("rtn", True)):
        rows = []
        for i in range(80):
            target = {"config": "c", "dataset": "adult", "row": i, "label": i % 2, "sensitive": i // 2 % 2, "group": i // 2 % 2}
            right = i % 2 == 0 if same else i % 5 > 0
            rows.append(
                {"item": f"f/{i}", "sample": 0, "cluster": f"c{i}", "dimension": "fairness", "scenario": "adult", "target": target,
                 "text": "", "text_sha": "0", "prompt_sha": "0", "finish_reason": "stop",
                 "outcome": "correct" if right else "wrong", "score": float(right)}
            )  # fmt: skip
        key = write_cell(record, method, {"fairness": rows}, bits=3)
    (found,) = of(tmp_path, "not_an_answer")
    assert found.key == key and found.message == "the same fairness answer to all in 100% of the configurations: no score"


def test_dense_off_its_published_value(tmp_path):
    row = {"model": "A 7b", "method": "none", "bits": 16, "name": "hf/acme/a-7b", "mmlu": 50.0}
    import_table(sheet(tmp_path / "t.csv", [row]), tmp_path / "r", "comp-trust-sheet")
    record = Record(tmp_path / "r")
    write_cell(record, "dense", {}, model="acme/A-7b@abc123", mmlu=42.0)
    write_cell(record, "dense", {}, model="acme/other", mmlu=10.0)
    (found,) = of(tmp_path / "r", "dense_off_published")
    assert (found.dimension, found.values) == ("mmlu", {"measured": 42.0, "published": 50.0})


def test_every_code_has_a_place(published_sheet):
    assert {a.code for a in alarms(load_results(published_sheet))} <= set(CODES)
