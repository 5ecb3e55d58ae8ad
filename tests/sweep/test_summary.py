"""Tables of the terminal."""

from __future__ import annotations

import io
import sys
import time
from types import SimpleNamespace

import pytest
from comptrust.actors.record import Record
from comptrust.sweep.progress import View
from comptrust.sweep.summary import print_rows, print_status
from rich.console import Console
from rich.live import Live


def shown(rows, width):
    console = Console(file=io.StringIO(), width=width)
    print_rows(rows, console)
    return console.file.getvalue()


def test_rows_wider_than_the_terminal_stand_as_blocks():
    """`select *` over 60 columns folded to one letter a line cannot be read."""
    narrow = shown([{"key": "ab", "bits": 4}, {"key": "cd", "bits": None}], 40)
    assert [line.split() for line in narrow.splitlines()] == [["key", "bits"], ["ab", "4"], ["cd", "-"]]
    wide = shown([{f"column_{i}": i * 1.5 for i in range(30)}, {f"column_{i}": "[red]x" for i in range(30)}], 100)
    assert "1 of 2" in wide and "2 of 2" in wide
    lines = [line.split() for line in wide.splitlines()]
    assert ["column_3", "4.5"] in lines and ["column_29", "[red]x"] in lines


def test_a_split_between_colons_is_no_picture(capsys):
    """rich writes a locomotive for `:train:`, in the middle of a calibration's source."""
    from comptrust.sweep.cli import _console

    source = "hub:allenai/c4:en:train:text"
    print_rows([{"calibration": source}], _console())
    view = View(quiet=False)
    view.console.print(source)
    out, err = capsys.readouterr()
    assert source in out and source in err


def test_errors_of_models_cannot_write_to_the_terminal():
    failure = {"label": "gptq [red]", "attempts": 1, "error_type": "CellError", "error": "\x1b]0;title\x07 [/] loss"}
    sweep = {
        "name": "s[/]", "sweep": "ab", "done": 0, "failed": 1, "left": 0, "total": 1, "running": True, "cells_per_hour": None,
        "workers": [{"id": 0, "label": "rtn\x1b[2J", "stage": "ethics", "done": 1, "total": 2}], "failures": [failure],
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    print_status({"results": "r", "cells": 0, "sweeps": [sweep]}, console)
    text = console.file.getvalue()
    assert "\x1b" not in text and "\x07" not in text
    assert "gptq [red]" in text and "[/] loss" in text and "s[/]" in text


def test_the_commands_that_follow_can_be_pasted(tmp_path):
    from comptrust.sweep.summary import print_summary

    place = str(tmp_path / "my results")
    record = Record(place)
    record.commit({"key": "k", "model": "m", "method": "dense", "status": "done", "suite": "smoke", "params": {}}, [], [])
    outcome = SimpleNamespace(
        interrupted=False, done=1, total=1, failed=0, skipped=0, seconds=1.0, loads=1, stages={}, results=place
    )
    console = Console(file=io.StringIO(), width=200)
    print_summary(outcome, console)
    assert f"comptrust status '{place}'" in console.file.getvalue()


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    from comptrust.sweep import cli, status

    def interrupted(results):
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "status", interrupted)
    monkeypatch.setattr(sys, "argv", ["comptrust", "status", "results/x"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_the_end_of_a_sweep_shows_its_own_cells(tmp_path):
    """Beside cells of another evaluation in the same record, which do not compare and would leave no frontier."""
    from comptrust.actors.record import Record
    from comptrust.sweep.launch import Outcome
    from comptrust.sweep.summary import print_summary

    record, value = (
        Record(tmp_path),
        {"convention": "comptrust", "dimension": "utility", "scenario": "", "metric": "perplexity"},
    )
    for sweep in "ab":
        keys = [f"{sweep}{i}" for i in range(4)]
        for i, key in enumerate(keys):
            cell = {"key": key, "model": f"m{i % 2}", "method": "rtn", "status": "done", "size_bytes": 100 + i, "params": {}}
            record.commit({**cell, "suite": "smoke", "evaluation": sweep}, [{**value, "value": 20.0 - i, "n": 1}], [])
        record.put_json(f"sweeps/{sweep}.json", {"id": sweep, "name": sweep, "keys": keys, "config": {}})
    console = Console(file=io.StringIO(), width=150)
    print_summary(Outcome("b", str(tmp_path), 4, 4, 0, 0, 1.0), console)
    text = console.file.getvalue()
    listed = [line.split()[:2] for line in text.splitlines() if line.startswith(("a", "b"))]
    assert listed == [["b3", "m1"], ["b2", "m0"], ["b1", "m1"], ["b0", "m0"]] and "Frontier: 4 of 4 cells" in text


def test_a_long_frontier_shows_its_best(tmp_path):
    from comptrust.sweep.frontier import pareto, render_frontier
    from comptrust.sweep.results import load_results

    record = Record(tmp_path)
    for i in range(50):
        cell = {"key": f"{i:024d}", "model": "m", "method": "rtn", "status": "done", "size_bytes": 1000 + i, "params": {}}
        metric = {
            "convention": "comptrust",
            "dimension": "utility",
            "scenario": "",
            "metric": "perplexity",
            "value": 100.0 - i,
            "n": 1,
        }
        record.commit(cell, [metric], [])
    results = load_results(tmp_path)
    console = Console(file=io.StringIO(), width=120)
    found = pareto(results, minimise=["perplexity", "size_bytes"], maximise=[], probability=False)
    render_frontier(found, results, console)
    text = console.file.getvalue()
    assert "Frontier: 50 of 50 cells, the first 40 by perplexity" in " ".join(text.split())
    assert " 51 " in text and " 100 " not in text.split("Frontier")[1].split("(up)")[0]


def test_the_live_frontier_is_of_the_sweeps_own_cells():
    """The record may hold cells of a smaller suite, whose trust is higher."""
    view = View(console=(console := Console(file=io.StringIO(), width=100)))
    view.live, view.labels = Live(console=console), {"a": "m gptq 4", "b": "m dense"}
    size = {"a": 1, "b": 2, "other": 1}
    view.add_points([{"key": k, "size_bytes": n, "trust": 90.0 - n, "perplexity": 5.0} for k, n in size.items()])
    assert view.front == ["a"] and set(view.points) == {"a", "b"}


def test_names_with_brackets_stand_in_the_live_view():
    view = View(console=Console(file=io.StringIO(), width=100))
    view.labels = {"k": "my[bold]model[/] gptq 4"}
    view.points, view.front = {"k": {"key": "k", "trust": None, "perplexity": 3.0, "size_bytes": 10**9}}, ["k"]
    worker = {"id": 0, "key": "k", "stage": "compress", "done": 1, "total": 2, "started": time.time()}
    view.console.print(view._render({"workers": [worker], "finished": []}, SimpleNamespace(total=2, done=1, failed=0)))
    assert view.console.file.getvalue().count("my[bold]model[/] gptq 4") == 2
