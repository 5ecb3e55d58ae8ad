"""One cell against another."""

from __future__ import annotations

import io
import json

import pytest
from comptrust.actors.errors import BadInput
from comptrust.actors.record import Record, to_table
from comptrust.sweep.alarms import alarms, render_alarms
from comptrust.sweep.claims import claims, render_claims
from comptrust.sweep.compare import compare, render_comparison
from comptrust.sweep.effects import Effects
from comptrust.sweep.frontier import pareto, render_frontier
from comptrust.sweep.recommend import recommend, render_recommendation
from comptrust.sweep.results import load_results
from decision_records import answers, write_cell
from rich.console import Console
from scipy.stats import binomtest


@pytest.fixture
def three(tmp_path):
    r = Record(tmp_path)
    right = [i % 4 != 0 for i in range(200)]
    dense = write_cell(r, "dense", {"ethics": answers("ethics", right)}, size_bytes=100, mmlu=50.0)
    worse = [ok and i > 30 for i, ok in enumerate(right)]
    better = [ok or i < 40 for i, ok in enumerate(right)]
    a = write_cell(r, "rtn", {"ethics": answers("ethics", worse)}, bits=3, size_bytes=20)
    b = write_cell(r, "gptq", {"ethics": answers("ethics", better)}, bits=3, size_bytes=20)
    return load_results(tmp_path), dense, a, b


def test_against_dense(three):
    results, dense, a, _ = three
    found = compare(results, a[:10])
    (e,) = found.effects
    assert (found.key, found.to, e.test) == (a, dense, "mcnemar")
    lost = sum(i % 4 != 0 for i in range(31))
    assert e.transitions["right_to_wrong"] == lost and e.delta == pytest.approx(-100 * lost / 200)
    assert e.p == pytest.approx(binomtest(lost, lost).pvalue) and e.p_holm == e.p
    assert [r["error"] for r in found.layers] == [0.02, 0.01, 0.0]
    json.dumps(found.to_json(), allow_nan=False)


def test_tasks_of_lm_eval_stand_beside_the_utility(tmp_path):
    r = Record(tmp_path)
    rows = answers("ethics", [True, False] * 20)
    for method, value in (("dense", 0.75), ("rtn", 0.5)):
        key = write_cell(r, method, {"ethics": rows}, mmlu=50.0)
        metrics = r.get_table(f"metrics/{key}.parquet").to_pylist()
        for scenario, metric in (("piqa", "acc"), ("lambada", "perplexity"), ("anatomy", "mmlu_accuracy")):
            metrics.append(
                {"key": key, "convention": "comptrust", "dimension": "utility", "scenario": scenario, "metric": metric,
                 "value": value, "n": 9}
            )  # fmt: skip
        r.put_table(f"metrics/{key}.parquet", to_table("metrics", metrics))
    found = compare(load_results(tmp_path), key).utility
    assert found == {"mmlu": (50.0, 50.0), "lambada perplexity": (0.5, 0.75), "piqa acc": (0.5, 0.75)}


def test_silence_still_shows_where_answers_went(tmp_path):
    r = Record(tmp_path)
    rows = answers("ethics", [True] * 30)
    write_cell(r, "dense", {"ethics": rows})
    key = write_cell(r, "rtn", {"ethics": [{**x, "outcome": "empty", "score": None} for x in rows]}, bits=2)
    (e,) = compare(load_results(tmp_path), key).effects
    assert (e.score, e.delta, e.valid, e.transitions["answered_to_silent"]) == (None, None, False, 30)
    console = Console(file=io.StringIO(), width=200)
    render_comparison(compare(load_results(tmp_path), key), console)
    assert "silent" in next(line for line in console.file.getvalue().splitlines() if "ethics" in line)


def test_two_compressed_cells(three):
    results, dense, a, b = three
    forth, back = compare(results, a, b), compare(results, b, a)
    assert forth.effects[0].delta == pytest.approx(-back.effects[0].delta)
    assert forth.effects[0].transitions["right_to_wrong"] == back.effects[0].transitions["wrong_to_right"] > 0
    assert compare(results, dense, a).effects[0].delta > 0  # a dense cell may be named with --to


def test_a_comparison_reads_the_items_of_its_two_cells(three):
    results, dense, a, b = three
    read = Effects(results, pairs={a: dense}).items
    assert [read.parts("ethics", key) is not None for key in (a, dense, b)] == [True, True, False]


def test_published_metrics_are_compared(published_summary):
    results = load_results(published_summary)
    key = results.rows("select key from results where model = 'llama2_13b' and method = 'sparsegpt' and sparsity = 0.6")[0][
        "key"
    ]
    cell, dense = compare(results, key).utility["rtp_mean_toxigen_score_ratio"]
    assert (round(cell, 3), round(dense, 3)) == (0.283, 0.161)


def test_bad_cells(three, tmp_path):
    results, dense, a, _ = three
    for args, says in ((("zz",), "no cell"), ((dense,), "dense cell itself"), ((a, a), "same cell")):
        with pytest.raises(BadInput, match=says):
            compare(results, *args)
    other = write_cell(
        Record(tmp_path), "rtn", {"ethics": answers("ethics", [True] * 9)}, bits=3, evaluation="e2", suite="smoke"
    )
    results = load_results(tmp_path)
    with pytest.raises(BadInput, match="no dense cell"):
        compare(results, other)
    with pytest.raises(BadInput, match="evaluated differently"):
        compare(results, other, a)
    other = write_cell(Record(tmp_path), "rtn", {"ethics": answers("ethics", [True] * 9)}, bits=8, evaluation="e3")
    with pytest.raises(BadInput, match=r"evaluated differently \((\w+) e3 and \1 \w+\)"):
        compare(load_results(tmp_path), other, a)


def test_everything_prints(three, small_sheet):
    """The terminal form names every cell and survives a narrow window."""
    results, _, a, _ = three
    for width in (60, 140):
        out = io.StringIO()
        console = Console(file=out, width=width)
        render_comparison(compare(results, a), console)
        render_frontier(pareto(results, ["size_bytes"], ["ethics"]), results, console)
        render_recommendation(recommend(results), console)
        render_claims(claims(results), console)
        sheet = load_results(small_sheet)
        render_alarms(alarms(sheet), console)
        render_claims(claims(sheet), console)
        render_frontier(pareto(sheet, ["bits"], ["mmlu"]), sheet, console)
        text = out.getvalue()
        assert a[:8] in text and "mcnemar" in text and "\N{HORIZONTAL ELLIPSIS}" not in text
