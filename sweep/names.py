"""Names of cells for people, distinct where cells are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..actors.cell import Cell

#: Columns of table ``cells`` that tell cells of one name apart, the most telling first.
_TELLING = (
    ("seed", "seed {}"),
    ("backend", "{}"),
    ("params", "{:.80}"),
    ("samples", "{} samples"),
    ("seqlen", "{} tokens"),
    ("calibration", "{:.80}"),
    ("dtype", "{}"),
    ("suite", "{}"),
    ("evaluation", "{:.8}"),
    ("template", "template {:.6}"),
    ("revision", "@{:.8}"),
    ("key", "{:.8}"),
)


def distinct(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """``names`` of ``rows`` (of table ``cells``), distinct within a model: other columns stand in a name only where names would be
    equal without; of the method's parameters those that differ."""
    names = list(names)
    for column, text in _TELLING:
        same: dict[tuple[str, str], list[int]] = {}
        for i, row in enumerate(rows):
            same.setdefault((row["model"], names[i]), []).append(i)
        for cells in same.values():
            values = [rows[i][column] for i in cells]
            if column == "params":
                values = _differing([v if isinstance(v, dict) else json.loads(v or "{}") for v in values])
            elif column == "calibration":  # the source, or a JSON block
                values = _differing([json.loads(v) if (v or "").startswith("{") else {"source": v} for v in values])
            if len(set(map(str, values))) > 1:
                for i, value in zip(cells, values, strict=True):
                    if value not in (None, ""):
                        names[i] = f"{names[i]} {text.format(value)}"
    return names


def asked(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The suite of each of ``rows`` (of table ``cells``); with it digest of the evaluation, dtype and revision where a model has
    several under one suite, which are never compared."""
    of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        of.setdefault((row["model"], row["suite"]), []).append(row)
    telling = {
        which: [c for c in ("evaluation", "dtype", "revision") if len({r[c] for r in same}) > 1] for which, same in of.items()
    }
    return [" ".join([str(r["suite"]), *(f"{r[c]!s:.8}" for c in telling[r["model"], r["suite"]])]) for r in rows]


def of_cells(cells: Sequence[Cell]) -> dict[str, str]:
    """Key -> name of the cells of a sweep: ``gptq 4 g128 seed 1``."""
    from ..actors.actor import cell_row

    return dict(zip((c.key for c in cells), distinct([cell_row(c) for c in cells], [c.label for c in cells]), strict=True))


def _differing(sets: Sequence[Mapping[str, Any]]) -> list[str]:
    """``damping 0.05, order act`` of each set of parameters: those that all sets have in common left out."""
    names = [
        n for n in dict.fromkeys(k for s in sets for k in s) if len({json.dumps(s.get(n), sort_keys=True) for s in sets}) > 1
    ]
    return [", ".join(f"{n} {_plain(s[n])}" for n in names if s.get(n) is not None) for s in sets]


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | tuple | bool) else str(value)
