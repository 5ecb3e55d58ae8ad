"""Tables of the terminal."""

from __future__ import annotations

import io

from comptrust.sweep.summary import print_rows
from rich.console import Console


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
