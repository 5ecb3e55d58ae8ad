"""Frontier against brute force, its probability against enumeration, and what it says to bad input."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from comptrust.actors.cell import DIMENSIONS
from comptrust.actors.errors import BadInput
from comptrust.actors.record import Record
from comptrust.sweep.frontier import _ranks, nondominated, pareto, render_frontier
from comptrust.sweep.results import load_results
from comptrust.sweep.summary import print_rows
from decision_records import answers, write_cell
from hypothesis import given, settings
from hypothesis import strategies as hs
from rich.console import Console


def brute(values, up):
    """Dominance as written in the textbook, row against row."""
    cost = np.where(up, -values, values)
    out = []
    for a in cost:
        if np.isnan(a).any():
            out.append(False)
            continue
        out.append(not any(not np.isnan(b).any() and (b <= a).all() and (b < a).any() for b in cost))
    return np.array(out, bool)


@settings(max_examples=1000, deadline=None)
@given(hs.data())
def test_equals_brute_force(data):
    n, k = data.draw(hs.integers(1, 25)), data.draw(hs.integers(1, 6))
    value = hs.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, -1.0, float("nan"), float("inf"), 1e-12, 1e12])
    values = np.array(data.draw(hs.lists(hs.lists(value, min_size=k, max_size=k), min_size=n, max_size=n)))
    up = data.draw(hs.lists(hs.booleans(), min_size=k, max_size=k))
    assert (nondominated(values, up) == brute(values, up)).all()


@pytest.mark.parametrize("column", ["mmlu", "average", "trust", *DIMENSIONS])
def test_published_sheet_equals_brute_force(published_sheet, column):
    results = load_results(published_sheet)
    found = pareto(results, ["bits"], [column], probability=False)
    assert len(found.keys) == 50
    assert (found.on_frontier == brute(found.values, [False, True])).all()
    assert found.on_frontier.any()


def test_frontier_by_hand(small_sheet):
    found = pareto(load_results(small_sheet), ["bits"], ["mmlu"], where="model = 'Base 13b'")
    rows = {(r["bits"], r["mmlu"]) for r in found.to_json()["rows"] if r["on_frontier"]}
    assert rows == {(3.0, 57.0), (4.0, 59.0), (8.0, 60.1)}
    ties = [r for r in found.rows() if (r["bits"], r["mmlu"]) == (4.0, 59.0)]
    assert len(ties) == 3 and all(r["on_frontier"] and r["rank"] == 1 for r in ties)


def test_one_objective_needs_no_list(small_sheet):
    results = load_results(small_sheet)
    assert pareto(results, "bits", "mmlu").to_json() == pareto(results, ["bits"], ["mmlu"]).to_json()


def test_json_and_csv_shape(small_sheet):
    found = pareto(load_results(small_sheet), ["bits"], ["mmlu", "trust"])
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["objectives"] == ["bits", "mmlu", "trust"]
    assert set(told["rows"][0]) >= {"key", "bits", "mmlu", "trust", "on_frontier", "probability"}
    assert json.loads(found.dumps()) == told
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [r["key"] for r in lines] == [r["key"] for r in told["rows"]]
    assert [float(r["mmlu"]) for r in lines] == [r["mmlu"] for r in told["rows"]]
    assert {r["probability"] for r in lines} > {""}  # cells without any uncertainty of their own


def test_missing_values_never_dominate(tmp_path):
    record = Record(tmp_path)
    full = write_cell(record, "dense", {}, mmlu=50.0, size_bytes=100)
    write_cell(record, "rtn", {}, mmlu=99.0, bits=8)  # no size
    found = pareto(load_results(tmp_path), ["size_bytes"], ["mmlu"])
    assert found.frontier_keys() == [full]
    assert {r["key"]: r["rank"] for r in found.rows()}[full] == 1
    assert [r["rank"] for r in found.rows() if r["size_bytes"] is None] == [None]


def test_cells_asked_different_questions_are_not_compared(tmp_path):
    record = Record(tmp_path)
    write_cell(record, "dense", {}, mmlu=50.0, size_bytes=100)
    smoke = write_cell(record, "dense", {}, mmlu=90.0, size_bytes=100, suite="smoke", evaluation="e2")
    write_cell(record, "rtn", {}, mmlu=99.0, suite="full", evaluation="e3")  # no size: not in the comparison
    results = load_results(tmp_path)
    with pytest.raises(BadInput, match=r"in 2 ways .*suite = 'standard'"):
        pareto(results, ["size_bytes"], ["mmlu"], probability=False)
    assert pareto(results, ["size_bytes"], ["mmlu"], "suite = 'smoke'", probability=False).frontier_keys() == [smoke]


@pytest.mark.parametrize("up", [[False], [True], [False, True]])
def test_rank_is_the_frontier_without_the_ranks_before(up):
    values = np.random.default_rng(0).integers(0, 6, (40, len(up))).astype(float)
    left, number, expected = np.ones(40, bool), 1, np.zeros(40, int)
    while left.any():
        on = brute(np.where(left[:, None], values, np.nan), up)
        expected[on], left, number = number, left & ~on, number + 1
    assert (_ranks(values, np.ones(40, bool), up) == expected).all()


def test_hypervolume_by_hand(tmp_path):
    record = Record(tmp_path)
    for i, (size, mmlu) in enumerate([(0, 0), (5, 5), (10, 10), (10, 0)]):
        write_cell(record, "rtn", {}, mmlu=float(mmlu), size_bytes=size, bits=i)
    # box 10 x 10, (5, 5) and (10, 10) above the worst corner (10, 0): 5 x 5 of 100
    assert pareto(load_results(tmp_path), ["size_bytes"], ["mmlu"]).hypervolume == pytest.approx(0.25)


def test_small_dense_is_the_yardstick(small_sheet):
    found = pareto(load_results(small_sheet), ["bits"], ["mmlu"], where="model = 'Base 13b'")
    verdict = {r["bits"]: r["vs_small_dense"]["verdict"] for r in found.rows() if r["vs_small_dense"] and r["mmlu"] > 50}
    assert verdict[3.0] == "dominates"  # 55 and 57 points of MMLU at 3 bits against 50 at 16
    weak = next(r for r in found.rows() if r["mmlu"] == 35.0)
    assert weak["vs_small_dense"]["better"] == ["bits"] and weak["vs_small_dense"]["worse"] == ["mmlu"]
    assert weak["vs_small_dense"]["model"] == "Base 7b"


# -- probability ---------------------------------------------------------------------------------------------------------


def two_cells(path, first, second):
    record = Record(path)
    a = write_cell(record, "rtn", {"ethics": answers("ethics", first)}, size_bytes=10, bits=4)
    b = write_cell(record, "gptq", {"ethics": answers("ethics", second)}, size_bytes=10, bits=4)
    found = pareto(load_results(path), ["size_bytes"], ["ethics"], draws=2000)
    return found, dict(zip(found.keys.to_pylist(), found.probability, strict=True)), a, b


def test_probability_is_paired(tmp_path):
    """The same prompts are drawn in both cells: a cell right wherever the other is, and once more, wins or ties every draw."""
    first = [True] * 20 + [False] * 20
    second = [True] * 21 + [False] * 19
    found, p, a, b = two_cells(tmp_path, first, second)
    assert found.basis == "items"
    assert p[b] == 1.0
    # a is on the frontier when prompt 20 is not drawn at all: (1 - 1/40)^40
    assert p[a] == pytest.approx((1 - 1 / 40) ** 40, abs=0.035)


def test_an_unanswered_prompt_leaves_cells_paired(tmp_path):
    """All but one of 60 prompts are answered alike: the cell that is right three times more often wins as if it had them all."""
    first = [7919 * i % 13 < 6 for i in range(60)]
    second = [ok or i in (2, 4, 9) for i, ok in enumerate(first)]
    chance = []
    for silent in ((), (58,)):
        record = Record(path := tmp_path / str(len(silent)))
        rows = answers("stereotype", second)
        rows = [{**r, "outcome": "unparseable", "score": None} if i in silent else r for i, r in enumerate(rows)]
        write_cell(record, "rtn", {"stereotype": answers("stereotype", first)}, size_bytes=10, bits=4)
        key = write_cell(record, "gptq", {"stereotype": rows}, size_bytes=10, bits=4)
        found = pareto(load_results(path), ["size_bytes"], ["stereotype"])
        chance.append(dict(zip(found.keys.to_pylist(), found.probability, strict=True))[key])
    assert chance[0] == pytest.approx(0.82, abs=0.06) and chance[1] == pytest.approx(0.85, abs=0.1)


def test_probability_of_even_cells(tmp_path):
    half = [True, False] * 20
    _, p, a, b = two_cells(tmp_path, half, [not x for x in half])
    assert p[a] == pytest.approx(0.56, abs=0.06) and p[b] == pytest.approx(0.56, abs=0.06)  # ties (12%) count for both


def test_probability_over_seeds_and_none_without(small_sheet):
    found = pareto(load_results(small_sheet), ["bits"], ["ethics"], where="model = 'Base 13b'")
    rows = found.rows()
    assert found.basis == "seeds"
    assert all((r["probability"] is None) == (r["bits"] != 4.0) for r in rows)
    # ethics 70, 66, 68 over seeds: each draw has one best, which one is even; ties of drawn values count for all
    exact = np.mean([vs[0] == max(vs) for vs in np.ndindex(3, 3, 3)])
    assert [r["probability"] for r in rows if r["bits"] == 4.0] == pytest.approx([exact] * 3, abs=0.05)
    assert np.isnan(pareto(load_results(small_sheet), ["bits"], ["mmlu"], where="bits = 8").probability).all()


def test_draws_are_reproducible(tmp_path):
    _, first, *_ = two_cells(tmp_path / "a", [True, False] * 10, [False, True] * 10)
    _, second, *_ = two_cells(tmp_path / "b", [True, False] * 10, [False, True] * 10)
    assert list(first.values()) == list(second.values())


def test_worst_drop_has_a_probability(tmp_path):
    record = Record(tmp_path)
    rng = np.random.default_rng(0)
    dense = rng.random(60) < 0.7
    write_cell(
        record,
        "dense",
        {"ethics": answers("ethics", list(dense)), "adversarial": answers("adversarial", list(dense))},
        size_bytes=100,
    )
    for bits, flip in ((8, 0.02), (4, 0.1), (3, 0.3)):
        rows = {d: answers(d, list(dense & (rng.random(60) > flip))) for d in ("ethics", "adversarial")}
        write_cell(record, "rtn", rows, size_bytes=bits, bits=bits)
    found = pareto(load_results(tmp_path), ["size_bytes", "worst_drop"], [], draws=500)
    # DuckDB's greatest() skips the six dimensions that were not evaluated
    assert found.basis == "items" and np.isfinite(found.probability[~np.isnan(found.values).any(axis=1)]).all()


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("minimise", "maximise", "where", "says"),
    [
        (["bitz"], [], None, "Did you mean bits?"),
        (["bits"], ["mmlu_"], None, "Did you mean mmlu?"),
        (["bits"], ["bits"], None, "minimised and maximised"),
        (["bits", "bits"], [], None, "twice"),
        ([], [], None, "no objective"),
        (["size_bytes"], ["mmlu"], None, "no data"),
        (["model"], ["mmlu"], None, "not a number"),
        (["bits"], ["mmlu"], "bits > 4 and bits < 3", "none of 12 cells"),
        (["bits"], ["mmlu"], "bitss < 4", "Did you mean bits?"),
        (["bits"], ["mmlu"], "bits <", "does not run"),
        (["bits"], ["mmlu"], "1 = 1) union select * from read_csv('/etc/passwd') where (1 = 1", "does not run"),
        (["bits"], ["mmlu"], "bits in (select count(*) from read_text('/etc/passwd'))", "does not run"),
    ],
)
def test_bad_input(small_sheet, minimise, maximise, where, says):
    with pytest.raises(BadInput, match=r"(?s)" + says.replace("?", r"\?")):
        pareto(load_results(small_sheet), minimise, maximise, where=where)


def test_objectives_that_never_meet(tmp_path):
    record = Record(tmp_path)
    write_cell(record, "dense", {}, mmlu=50.0)
    write_cell(record, "rtn", {}, size_bytes=10)
    with pytest.raises(BadInput, match="no cell has a value in every objective"):
        pareto(load_results(tmp_path), ["size_bytes"], ["mmlu"])


def test_only_failed_cells(tmp_path):
    record = Record(tmp_path)
    record.fail(
        {
            "key": "k1",
            "method": "gptq",
            "model": "m",
            "attempts": 1,
            "error_type": "CellError",
            "error": "singular Hessian\nlong",
        }
    )
    with pytest.raises(BadInput, match=r"all 1 cells failed.*singular Hessian"):
        pareto(load_results(tmp_path), ["bits"], ["mmlu"])


def test_a_metric_outside_the_view(published_summary):
    found = pareto(load_results(published_summary), ["perplexity"], ["bbq_avg_acc_disambiguated"])
    assert len(found.keys) == 144
    assert (found.on_frontier == brute(found.values, [False, True])).all()
    with pytest.raises(BadInput, match="Did you mean bbq_avg"):
        pareto(load_results(published_summary), ["perplexity"], ["bbq_avg_acc_disambiguatd"])


def test_column_names_are_not_sql(small_sheet):
    with pytest.raises(BadInput, match="unknown column"):
        pareto(load_results(small_sheet), ['bits" from results; --'], [])


def test_keys_are_strings(small_sheet):
    assert pareto(load_results(small_sheet), ["bits"]).keys.type == pa.string()


@pytest.mark.parametrize("width", [200, 80, 40])
def test_a_narrow_terminal_cuts_no_number(tmp_path, width):
    """Where the table has no room for them (they were folded, at 40 columns gone) a cell is a line of text."""
    r = Record(tmp_path)
    sizes = [123_456_789, 234_567_890, 345_678_901]
    for bits, size in zip((3, 4, 8), sizes, strict=True):
        write_cell(
            r, "gptq", {}, bits=bits, group_size=128, seed=0, size_bytes=size, mmlu=50.125 + bits, perplexity=20.5 - bits
        )
    results = load_results(tmp_path)
    console = Console(file=io.StringIO(), width=width)
    render_frontier(pareto(results, ["size_bytes", "perplexity", "bits"], ["mmlu"]), results, console)
    text = " ".join(console.file.getvalue().split())
    assert all(n in text for n in ("123.5M", "234.6M", "345.7M", "53.1", "58.1", "17.5", "12.5", "gptq 3 g128 s0"))


def test_a_model_whose_path_looks_like_markup(tmp_path):
    """Folders may have brackets in their names."""
    r = Record(tmp_path)
    model = "models/[/bold]llama[red]"
    for size in (5, 8):
        write_cell(r, "rtn", {}, model=model, bits=size, size_bytes=size, perplexity=20.0 - size)
    results = load_results(tmp_path)
    console = Console(file=io.StringIO(), width=120)
    render_frontier(pareto(results, ["size_bytes", "perplexity"]), results, console)
    assert model in console.file.getvalue()
    console = Console(file=io.StringIO(), width=120)
    print_rows(results.rows('select 1 as "[/x]"'), console)
    assert "[/x]" in console.file.getvalue()
