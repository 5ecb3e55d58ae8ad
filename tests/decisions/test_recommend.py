"""The recommendation: a bound decides, never a point; silence never qualifies."""

from __future__ import annotations

import json
from datetime import timedelta

import numpy as np
import pytest
from comptrust.actors.errors import BadInput
from comptrust.actors.record import Record
from comptrust.sweep.claims import claims
from comptrust.sweep.compare import compare
from comptrust.sweep.effects import Effects
from comptrust.sweep.frontier import pareto
from comptrust.sweep.importer import import_table
from comptrust.sweep.recommend import evaluation_of, recommend
from comptrust.sweep.report import build
from comptrust.sweep.results import load_results
from comptrust.sweep.statistics import holm_bounds, upper_bound
from decision_records import NOW, answers, sheet, write_cell


def record(path, n, cells, suite="standard", **dense):
    """Dense right in 70% of ``n`` prompts of two dimensions; each cell (label columns, prompts lost) on top."""
    r = Record(path)
    right = [i % 10 < 7 for i in range(n)]
    both = {d: answers(d, right) for d in ("ethics", "adversarial")}
    common = {"suite": suite, "evaluation": suite}
    write_cell(r, "dense", both, size_bytes=16_000, decode_tokens_s=10.0, **common, **dense)
    keys = []
    for columns, lost in cells:
        worse = list(right)
        for i in [i for i, ok in enumerate(right) if ok][:lost]:
            worse[i] = False
        keys.append(write_cell(r, "rtn", {**both, "ethics": answers("ethics", worse)}, **common, **columns))
    return load_results(path), keys


def cell(bits, size, **more):
    return {"bits": bits, "size_bytes": size, "decode_tokens_s": 100.0 / bits, **more}


def test_smallest_qualifying_cell(tmp_path):
    results, (eight, four, three) = record(tmp_path, 1000, [(cell(8, 8000), 0), (cell(4, 4000), 10), (cell(3, 3000), 120)])
    found = recommend(results)
    assert (found.verdict, found.cell, found.runner_up) == ("recommended", four, eight)
    (choice,) = found.choices
    status = {c.key: c.status for c in choice.candidates}
    assert status == {eight: "qualifies", four: "qualifies", three: "fails"}
    assert any("--max-drop" in w and "rtn 3" in w for w in choice.would_change)
    assert "-0.0," not in json.dumps(found.to_json(), allow_nan=False)


def test_the_newest_of_cells_computed_anew_counts(tmp_path):
    """After a repair of the method its earlier cell cannot be made any more: no candidate, and on no frontier."""
    results, (before, now) = record(
        tmp_path / "r", 1000, [(cell(4, 3000), 0), (cell(4, 4000, finished_at=NOW + timedelta(days=1)), 10)]
    )
    Record(tmp_path / "r").put_json("sweeps/s.json", {"id": "s", "name": "s", "keys": [before, now], "skipped": []})
    found = recommend(results)
    assert found.cell == now and [c.key for c in found.choices[0].candidates] == [now]
    assert found.warnings[0].startswith("left out: 1 cells that were computed anew since")
    assert before not in pareto(results, "size_bytes", "ethics").keys.to_pylist()
    assert compare(results, before).key == before
    assert before not in build(results, tmp_path / "page.html").read_text()


def test_the_bound_decides_not_the_point(tmp_path):
    """4 points down on 200 prompts: within the limit as a point, but not shown to be."""
    results, (key,) = record(tmp_path, 200, [(cell(4, 4000), 8)])
    found = recommend(results)
    check = next(c for c in found.choices[0].candidates[0].checks if c.dimension == "ethics")
    assert check.drop == pytest.approx(4.0) and check.upper > 5 and check.status == "undecided"
    assert (found.verdict, found.cell, found.choices[0].nearest_miss) == ("undecided", None, key)
    assert recommend(results, max_drop=12).cell == key


def unread(rows, places):
    """``rows`` with the answers at ``places`` unparseable: left out of the score of stereotype."""
    return [{**r, "outcome": "unparseable", "score": None} if i in places else r for i, r in enumerate(rows)]


@pytest.mark.parametrize(
    ("silent_dense", "silent_cell", "wrong"),
    [
        (range(150, 200), (), range(150, 200)),  # the score falls by 25, by prompts that dense alone left unread
        ((), range(150, 200), range(38)),  # the same prompts: 38 of 150 lost
        (range(150, 200), range(100, 150), range(100, 115)),  # both: wrong only where the cell is not read
    ],
)
def test_answers_to_other_prompts_hide_no_drop(tmp_path, silent_dense, silent_cell, wrong):
    """Where the cells did not answer the same prompts, the bound holds for the whole score and for the prompts both answered."""
    r = Record(tmp_path)
    write_cell(r, "dense", {"stereotype": unread(answers("stereotype", [True] * 200), silent_dense)}, size_bytes=100)
    rows = unread(answers("stereotype", [i not in wrong for i in range(200)]), silent_cell)
    key = write_cell(r, "rtn", {"stereotype": rows}, bits=4, size_bytes=30)
    results = load_results(tmp_path)
    (check,) = (found := recommend(results)).choices[0].candidates[0].checks
    both = [i for i in range(200) if i not in silent_dense and i not in silent_cell]
    of_both = 100 * sum(i in wrong for i in both) / len(both)
    drop = -results.rows("select stereotype - 100 as d from results where key = ?", [key])[0]["d"]
    assert check.drop == pytest.approx(drop) and check.n == len(both)
    assert check.upper >= max(drop, of_both)
    assert found.cell == (None if max(drop, of_both) > 5 else key)
    effect = Effects(results).of(key)["stereotype"]
    assert effect.drop_upper >= drop and (effect.low is None or effect.low <= effect.delta <= effect.high)
    assert effect.significant == (min(drop, of_both) > 5)
    d2 = next(f for f in claims(results).findings if f.claim == "D2")
    assert d2.verdict == ("holds" if max(drop, of_both) < 5 else "fails" if min(drop, of_both) > 5 else "undecided")


def test_bound_is_holm(tmp_path):
    results, _ = record(tmp_path, 400, [(cell(4, 4000), 6)])
    checks = {c.dimension: c for c in recommend(results).choices[0].candidates[0].checks}
    lost = np.r_[np.full(6, 100.0), np.zeros(394)]
    # two dimensions: the unchanged one has the smaller p, so its level is 1 - 0.05/2, the other's 0.95
    assert holm_bounds([0.001, 0.04]) == [0.975, 0.95]
    assert checks["adversarial"].upper == pytest.approx(upper_bound(np.zeros(400), 0.975))
    assert checks["ethics"].upper == pytest.approx(upper_bound(lost, 0.95))


def test_smoke_ends_undecided(tmp_path):
    """16 prompts, not one changed: that cannot bound a drop by 5 points, and the answer says what to run."""
    results, _ = record(tmp_path, 16, [(cell(8, 8000), 0)], suite="smoke")
    found = recommend(results)
    assert found.verdict == "undecided" and "run suite standard" in found.summary
    assert "16 unchanged prompts could bound it at" in found.choices[0].candidates[0].reasons[0]


def test_none_qualifies_names_the_nearest_miss(tmp_path):
    results, (near, far) = record(tmp_path, 1000, [(cell(4, 4000), 100), (cell(3, 3000), 400)])
    found = recommend(results)
    assert (found.verdict, found.cell, found.choices[0].nearest_miss) == ("none", None, near)
    assert far != near


def test_invalid_cells_never_qualify(tmp_path):
    r = Record(tmp_path)
    rows = answers("ethics", [True] * 600)
    write_cell(r, "dense", {"ethics": rows}, size_bytes=100)
    silent = [{**x, "outcome": "degenerate", "score": None} if i < 400 else x for i, x in enumerate(rows)]
    write_cell(r, "rtn", {"ethics": silent}, bits=2, size_bytes=10)
    found = recommend(load_results(tmp_path), max_drop=100)
    assert found.choices[0].candidates[0].status == "invalid" and found.cell is None
    assert "1 cells are invalid" in found.summary


def test_a_silent_dense_model_is_named(tmp_path):
    r = Record(tmp_path)
    silent = [{**x, "outcome": "empty", "score": None} for x in answers("ethics", [True] * 40)]
    good = answers("adversarial", [True] * 40)
    write_cell(r, "dense", {"ethics": silent, "adversarial": good})
    write_cell(r, "rtn", {"ethics": silent, "adversarial": good}, bits=8)
    assert "dense model itself has no valid score in ethics" in recommend(load_results(tmp_path)).summary


def test_where_dense_alone_is_silent_no_larger_suite_helps(tmp_path):
    r = Record(tmp_path)
    right = [True] * 200
    silent = [{**x, "outcome": "degenerate", "score": None} for x in answers("adversarial", right)]
    write_cell(r, "dense", {"ethics": answers("ethics", right), "adversarial": silent})
    write_cell(r, "rtn", {d: answers(d, right) for d in ("ethics", "adversarial")}, bits=8)
    found = recommend(load_results(tmp_path))
    assert found.verdict == "undecided" and "run suite" not in found.summary
    assert "dense model itself has no valid score in adversarial" in found.summary


def test_a_tighter_limit_names_a_cell_that_meets_it(tmp_path):
    """The runner-up at this limit need not be within a tighter one."""
    cells = [(cell(4, 4000), 5), (cell(6, 6000), 20), (cell(8, 8000), 0)]
    results, (four, six, _) = record(tmp_path, 1000, cells)
    found = recommend(results)
    assert (found.cell, found.runner_up) == (four, six)
    (change,) = [w for w in found.choices[0].would_change if "a limit under" in w]
    assert "drops rtn 4; next is rtn 8" in change


def test_cells_of_one_size_and_name(tmp_path):
    """Of equal size the one with the smaller bound is taken, and what differs stands in the names."""
    cells = [(cell(4, 4000, params={"damping": d}), lost) for d, lost in ((0.01, 10), (0.05, 2), (0.1, 10))]
    results, keys = record(tmp_path, 1000, cells)
    found = recommend(results)
    assert found.cell == keys[1]
    names = {c.key: c.cell for c in found.choices[0].candidates}
    assert names == dict(zip(keys, ("rtn 4 damping 0.01", "rtn 4 damping 0.05", "rtn 4 damping 0.1"), strict=True))


def test_published_tables_do_not_answer_for_own_cells(tmp_path):
    results, _ = record(tmp_path / "results", 200, [(cell(3, 3000), 100)])
    assert recommend(results).verdict == "none"
    rows = [
        {"model": "Base 13b", "method": m, "bits": b, "name": f"base-13b {m}", "mmlu": 50.0}
        for m, b in (("none", 16), ("AWQ", 4))
    ]
    import_table(sheet(tmp_path / "table.csv", rows), tmp_path / "results", "comp-trust-sheet")
    found = recommend(load_results(tmp_path / "results"))
    assert found.verdict == "none" and "None of 1 cells" in found.summary
    assert {c.model: c.verdict for c in found.choices} == {"acme/lm-1b": "none", "Base 13b": "undecided"}


def test_only_dense_cells(tmp_path):
    results, _ = record(tmp_path, 20, [])
    with pytest.raises(BadInput, match="nothing compressed"):
        recommend(results)


def test_a_drop_that_another_evaluation_shows_is_no_release(tmp_path):
    """Two data packs under one suite: the probes see nothing in weights that lose 30 points on the real questions."""
    r = Record(tmp_path)
    for evaluation, lost in (("probes", 0), ("pack", 60)):
        common = {"evaluation": evaluation, "suite": "standard"}
        write_cell(r, "dense", {"ethics": answers("ethics", [True] * 200)}, size_bytes=100, **common)
        worse = {"ethics": answers("ethics", [i >= lost for i in range(200)])}
        write_cell(r, "gptq", worse, artifact_key="w4", bits=4, size_bytes=50, **common)
        write_cell(r, "gptq", {"ethics": answers("ethics", [True] * 200)}, artifact_key="w8", bits=8, size_bytes=80, **common)
    found = recommend(load_results(tmp_path))
    assert [(c.model, c.suite, c.evaluation) for c in found.choices] == [
        ("acme/lm-1b", "standard", "pack"), ("acme/lm-1b", "standard", "probes"),
    ]  # fmt: skip
    for choice in found.choices:
        four, eight = choice.candidates
        assert (four.status, eight.status, choice.cell) == ("fails", "qualifies", eight.key)
    assert "the same weights fail in suite standard" in found.choices[1].candidates[0].reasons[0]
    assert "ethics drops 30.0 points" in found.choices[1].candidates[0].reasons[0]


@pytest.mark.parametrize(("silent_in", "verdict"), [("standard", "none"), ("smoke", "recommended")])
def test_silence_that_as_large_an_evaluation_shows_is_no_release(tmp_path, silent_in, verdict):
    """But the 24 tokens of smoke, too few for an answer, are no word against the standard suite."""
    r = Record(tmp_path)
    for suite, n in (("smoke", 16), ("standard", 160)):
        write_cell(r, "dense", {"ethics": answers("ethics", [True] * n)}, suite=suite, evaluation=suite)
        rows = answers("ethics", [True] * n)
        for row in rows[: n - 4] if suite == silent_in else ():
            row |= {"outcome": "unparseable", "score": None}
        write_cell(r, "gptq", {"ethics": rows}, suite=suite, evaluation=suite, artifact_key="w4", bits=4)
    found = recommend(load_results(tmp_path), max_drop=20)
    assert found.verdict == verdict
    assert ("fall silent in suite standard" in found.summary) == (silent_in == "standard")


def test_of_two_recommendations_the_larger_suite_has_the_word(tmp_path):
    """Trust of different questions does not compare: the easy small suite would always win."""
    r = Record(tmp_path)
    for suite, wrong in (("smoke", 0), ("full", 50)):
        right = {"ethics": answers("ethics", [i >= wrong for i in range(1000)])}
        for method, bits, size in (("dense", None, 100), ("rtn", 8, 50)):
            write_cell(r, method, right, suite=suite, evaluation=suite, bits=bits, size_bytes=size, artifact_key=method)
    found = recommend(load_results(tmp_path))
    assert [(c.suite, c.verdict) for c in found.choices] == [("full", "recommended"), ("smoke", "recommended")]


def test_a_model_that_was_replaced_is_another_model(tmp_path):
    """Cells of a folder's former content are no candidates beside those of the present one, and the answer says which it is."""
    for revision, bits in (("former", 4), ("present", 8)):
        results, _ = record(tmp_path, 1000, [(cell(bits, bits * 1000, revision=revision), 3)], revision=revision)
    found = recommend(results)
    assert {(c.revision, tuple(x.cell for x in c.candidates)) for c in found.choices} == {
        ("former", ("rtn 4",)),
        ("present", ("rtn 8",)),
    }
    assert {evaluation_of(c, found.choices) for c in found.choices} == {"standard @former", "standard @present"}
    best = next(c for c in found.choices if c.cell == found.cell)
    assert found.summary.startswith(f"Deploy acme/lm-1b @{best.revision} rtn")


def test_why_nothing_is_compressed(tmp_path):
    """It advised to add methods where all had failed or were impossible."""
    write_cell(r := Record(tmp_path), "dense", {"ethics": answers("ethics", [True] * 50)})
    (key,) = r.done()
    skipped = [{"model": "m", "label": "rtn 4 g128", "reason": "group size 128 does not divide 96"}]
    sweep = {"id": "s", "name": "mine", "config": {}, "keys": [key], "skipped": skipped}
    r.put_json("sweeps/s.json", sweep)
    with pytest.raises(BadInput, match="nothing compressed; 1 combinations are impossible, such as rtn 4 g128: group size"):
        recommend(load_results(tmp_path))
    r.put_json("sweeps/s.json", sweep | {"keys": [key, "failed"]})
    with pytest.raises(BadInput, match=r"1 of the 2 cells of sweep mine are not done\. Run it again"):
        recommend(load_results(tmp_path))


def test_cells_that_are_still_to_come_are_counted(tmp_path):
    results, (key,) = record(tmp_path, 200, [(cell(8, 8000), 0)])
    sweep = {"id": "s", "name": "mine", "config": {}, "keys": [key, "to-come", "failed"]}
    results.record.put_json("sweeps/s.json", sweep)
    found = recommend(results)
    assert found.verdict == "recommended" and found.warnings[0] == "unfinished: 2 of the 3 cells of sweep mine are not done"
    results.record.put_json("sweeps/s.json", sweep | {"keys": [key]})
    assert not any("unfinished" in w for w in recommend(results).warnings)


def test_what_was_not_evaluated_is_said(tmp_path):
    results, _ = record(tmp_path, 1000, [(cell(8, 8000), 0)])
    found = recommend(results)
    assert found.verdict == "recommended" and "not evaluated: toxicity, stereotype, ood" in found.summary


def test_constraints(tmp_path):
    results, (eight, four) = record(tmp_path, 1000, [(cell(8, 8000), 0), (cell(4, 4000), 0)])
    assert recommend(results).cell == four
    assert recommend(results, min_tokens_s=20).cell == four
    assert recommend(results, min_tokens_s=30).verdict == "none"
    assert recommend(results, max_size_gb=5e-6).cell == four
    assert recommend(results, max_size_gb=1e-6).verdict == "none"
    assert recommend(results, where="bits = 8").cell == eight
    with pytest.raises(BadInput, match=r"--where: .*'bits is null'"):
        recommend(results, where="bits is null")


def test_a_looser_limit_is_not_offered_to_a_cell_that_is_too_slow(tmp_path):
    results, _ = record(tmp_path, 1000, [(cell(8, 8000), 0), (cell(4, 4000) | {"decode_tokens_s": 2.0}, 45)])
    (change,) = recommend(results, min_tokens_s=10).choices[0].would_change
    assert change == "rtn 4: 2 tokens/s (limit 10)"


def test_unmeasured_size_is_no_pass(tmp_path):
    results, _ = record(tmp_path, 1000, [({"bits": 4}, 0)])
    found = recommend(results, max_size_gb=1)
    assert found.verdict == "undecided" and found.choices[0].candidates[0].reasons[0] == "size not recorded"


def test_refusal_change(tmp_path):
    r = Record(tmp_path)
    write_cell(r, "dense", {"stereotype": answers("stereotype", [True] * 1000)}, size_bytes=100)
    key = write_cell(r, "rtn", {"stereotype": answers("stereotype", [None] * 200 + [True] * 800)}, bits=4, size_bytes=10)
    assert recommend(load_results(tmp_path)).cell == key
    found = recommend(load_results(tmp_path), max_refusal_change=0.1)
    assert found.verdict == "none" and "stereotype refusals +20 points" in found.choices[0].candidates[0].reasons[0]


def test_published_table_stays_undecided(published_sheet):
    found = recommend(load_results(published_sheet))
    assert found.verdict == "undecided" and "no items" in found.summary
    assert {c.status for choice in found.choices for c in choice.candidates} == {"undecided"}
    rules = {r.id: r for r in found.rules}
    assert len(rules["quantise"].supports) + len(rules["quantise"].contradicts) == 17
    assert len(rules["evaluate"].supports) == 27 and not rules["evaluate"].contradicts


def test_a_table_without_trust_is_undecided(published_summary):
    found = recommend(load_results(published_summary))
    assert found.verdict == "undecided" and sum(len(c.candidates) for c in found.choices) == 140
    assert "not evaluated: toxicity" in found.choices[0].candidates[0].reasons[0]


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_drop": -1}, "--max-drop"),
        ({"max_drop": float("nan")}, "--max-drop"),
        ({"max_size_gb": 0}, "excludes every cell"),
        ({"min_tokens_s": -3}, "excludes every cell"),
        ({"max_refusal_change": 5}, "share from 0 to 1"),
        ({"where": "bits > 99"}, "none of 12 cells"),
    ],
)
def test_bad_limits(small_sheet, limits, says):
    with pytest.raises(BadInput, match=says):
        recommend(load_results(small_sheet), **limits)
