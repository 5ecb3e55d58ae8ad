"""Published tables as cells, so that they stand beside one's own results as reference.

One row is one cell of status ``published``. A table has no items: everything derived from it has basis ``point`` or
``seeds``. Metrics are stored as published under convention ``comp-trust`` and again under ``comptrust``, the convention of
view ``results``, with ``scorer`` naming the table; suites and models differ from a user's own, so the two are never
subtracted from each other.
Formats and columns: docs/decisions.md.
"""

from __future__ import annotations

import csv
import datetime as dt
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..actors.cell import digest
from ..actors.errors import BadInput
from ..actors.record import UTILITY, Record
from .effects import PRUNED

FORMATS = ("comp-trust-sheet", "beyond-perplexity")
#: Scores of the sheet by our dimension.
SHEET = {
    "toxicity": "Toxicity",
    "stereotype": "Stereotype",
    "adversarial": "AdvGLUE++",
    "ood": "OOD",
    "demonstrations": "Adv Demo",
    "privacy": "Privacy",
    "ethics": "Ethics",
    "fairness": "Fairness",
}
#: The sheet mixes units: these refusal columns are fractions, the others percent.
_FRACTIONS = ("toxicity", "fairness")
_METHODS = {
    "none": "dense",
    "dense": "dense",
    "mag": "magnitude",
    "magnitude": "magnitude",
    "wanda": "wanda",
    "sparsegpt": "sparsegpt",
    "gblm": "gblm",
    "gptq": "gptq",
    "awq": "awq",
    "bitsandbytes": "llm_int8",
}
#: Bits of the quantised rows of Beyond Perplexity, which has no such column (arXiv 2407.04965: LLM.int8, AWQ-4, GPTQ-4).
_BP_BITS = {"llm_int8": 8, "awq": 4, "gptq": 4}
#: Hub ids of the table's base models: how a user's own dense cell finds its published value.
_BP_SOURCES = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "llama2_13b": "meta-llama/Llama-2-13b-hf",
    "tulu2_7b": "allenai/tulu-2-7b",
    "tulu2_13b": "allenai/tulu-2-13b",
}
#: Beyond Perplexity's columns by what they measure; a column that starts with the prefix belongs to the group.
BP_GROUPS = {
    "rtp_": "degeneration",
    "toxigen_": "degeneration",
    "advpromptset_": "degeneration",
    "bold_": "degeneration",
    "holistic_": "degeneration",
    "bbq_": "representation",
    "unqover_": "representation",
    "aave_": "dialect",
    "twitter": "dialect",
    "wikitext2": UTILITY,
    "avg_dolma": UTILITY,
}
_BP_KEYS = ("base_model", "compression_method", "compression_ratio", "pruning_structure")


class _Row(NamedTuple):
    cell: dict[str, Any]
    metrics: list[dict[str, Any]]


def import_table(file: str | Path, results_uri: str | Path, format: str) -> int:
    """Write the rows of a published CSV as cells into ``results_uri`` and return how many.

    Importing the same rows again writes the same keys, so nothing doubles; equal rows *within* a file stay separate cells
    (and raise an alarm). ``BadInput`` for an unknown format, a missing file or column, or a value that is no number (with its
    line).
    """
    if format not in FORMATS:
        raise BadInput(f"unknown format {format!r}", where="--format", fix=f"One of: {', '.join(FORMATS)}.")
    rows = list(_read(file))
    if not rows:
        raise BadInput("the table has no rows", where=str(file))
    parse = _sheet_row if format == "comp-trust-sheet" else _perplexity_row
    _check_columns(str(file), rows[0][1], format)
    from .launch import check_writable

    parsed_rows = [parse(f"{file}:{line}", row) for line, row in rows]  # all or none
    check_writable(record := Record(results_uri))
    seen: Counter[str] = Counter()
    now = dt.datetime.now(dt.UTC)
    for (_, row), parsed in zip(rows, parsed_rows, strict=True):
        identity = digest({"published": format, "row": row})
        seen[identity] += 1
        key = digest({"published": identity, "occurrence": seen[identity]})
        cell = {
            "key": key,
            "artifact_key": digest({"published": format, "cell": {k: str(v) for k, v in parsed.cell.items()}}),
            "backend": "published",
            "dtype": "float16",
            "suite": format,
            "evaluation": f"published:{format}",
            "status": "published",
            "attempts": 1,
            "started_at": now,
            "finished_at": now,
            **parsed.cell,
        }
        metrics = [
            {"scenario": "", "scorer": format, "scorer_version": "published", "n": None, **m, "convention": convention}
            for m in parsed.metrics
            for convention in (("comp-trust", "comptrust") if format == "comp-trust-sheet" else ("comptrust",))
        ]
        record.commit(cell, metrics, [])
    return len(rows)


def _read(file: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV; blank lines skipped, cells stripped."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read: {e}", where=str(file), fix="Give a UTF-8 CSV file.") from e
    reader = csv.DictReader(text.splitlines())
    while True:
        try:
            if (row := next(reader, None)) is None:
                return
        except csv.Error as e:  # a quotation mark that nobody closes swallows the rest of the file
            raise BadInput(f"no CSV: {e}", where=f"{file}:{reader.line_num}", fix="Close its quotation marks.") from e
        if None in row or None in row.values():
            raise BadInput(
                f"has {'more' if None in row else 'fewer'} columns than the header", where=f"{file}:{reader.line_num}"
            )
        if any(v.strip() for v in row.values()):
            yield reader.line_num, {k.strip(): v.strip() for k, v in row.items()}


def _check_columns(file: str, row: Mapping[str, str], format: str) -> None:
    needed = ["Model"] if format == "comp-trust-sheet" else list(_BP_KEYS)
    missing = [c for c in needed if c not in row]
    if format == "comp-trust-sheet" and not any(c in row for c in SHEET.values()):
        missing.append(f"one of {', '.join(SHEET.values())}")
    if missing:
        raise BadInput(
            f"no column {', '.join(missing)}; there are {', '.join(row)}",
            where=file,
            fix=f"Is this a {format} table? The other format is {next(f for f in FORMATS if f != format)}.",
        )


def _number(where: str, row: Mapping[str, str], column: str) -> float | None:
    text = row.get(column, "")
    if text.lower() in ("", "-", "na", "nan", "none", "null"):
        return None
    try:
        value = float(text)
    except ValueError as e:
        raise BadInput(f"{column} is {text!r}, not a number", where=where) from e
    if value in (float("inf"), float("-inf")):
        raise BadInput(f"{column} is {text!r}", where=where, fix="Leave the field empty where there is no value.")
    return value


def _within(where: str, row: Mapping[str, str], column: str, most: float) -> float | None:
    value = _number(where, row, column)
    if value is not None and not 0 <= value <= most:
        raise BadInput(f"{column} is {value:g}, expected 0 to {most:g}", where=where)
    return value


def _named(where: str, name: str, column: str) -> str:
    if not name:
        raise BadInput(f"{column} is empty", where=where, fix="Give every row its model.")
    return name


def parameters_of(name: str) -> int | None:
    """Nominal parameter count in a model name (``Llama-2-13b``: 13 billion, ``SmolLM2-135M``: 135 million), None if unsaid."""
    found = re.search(r"(?<![a-z\d.])(\d+(?:\.\d+)?)([bm])(?![a-z])", name.lower())
    return round(float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]]) if found else None


def _pattern(text: str) -> tuple[str, float] | None:
    """``2to4`` or ``2:4`` or ``24`` -> ("2:4", sparsity 0.5)."""
    found = re.search(r"(?<!\d)([1-9])(?:to|:)?([1-9])(?!\d)", text)
    return (f"{found[1]}:{found[2]}", 1 - int(found[1]) / int(found[2])) if found else None


# -- Decoding Compressed Trust --------------------------------------------------------------------------------------------


def _sheet_row(where: str, row: Mapping[str, str]) -> _Row:
    """A row of the sheet, or of a leaderboard with the same score columns: what is absent is read from ``Model``."""
    name = _named(where, row["Model"], "Model")
    stated = row.get("Method Subtype", "").lower()
    named = _method_in(name)
    if stated and stated not in _METHODS:
        raise BadInput(f"unknown method {row['Method Subtype']!r}", where=where, fix=f"One of: {', '.join(_METHODS)}.")
    method = _METHODS[stated] if stated else named or "dense"
    bits, share = _number(where, row, "Sparsity/bits"), None
    if bits is not None and method in PRUNED and 0 < bits < 1:  # the column holds either
        bits, share = None, bits
    elif bits is not None and (not 1 <= bits <= 64 or not bits.is_integer()):
        raise BadInput(f"Sparsity/bits is {bits:g}: no number of bits, and {method} has no sparsity", where=where)
    named_bits = re.search(r"(\d+)bit", name)
    if bits is None and named_bits:
        bits = int(named_bits[1])
    if method == "dense" and bits is None:
        bits = 16
    group = re.search(r"(\d+)g(?![a-z\d])", name)
    pattern = _pattern(m[0]) if (m := re.search(r"\d+to\d+", name)) else None
    sparsity = re.search(r"@(0\.\d+)", name)
    seed = re.search(r"seed(\d+)|(\d+)seed", name)
    base = row.get("Base Model") or re.split(r"[-_](?:awq|gptq|magnitude|sparsegpt|wanda)", name, flags=re.I)[0]
    notes = []
    if stated and named is not None and named != method:
        notes.append(f"column says {method}, name says {named}")
    if bits is not None and named_bits and int(named_bits[1]) != int(bits):
        notes.append(f"column says {bits:g} bits, name says {named_bits[1]}")
    cell = {
        "model": base,
        "revision": f"published:{base}",
        "method": method,
        "bits": None if bits is None else int(bits),
        "group_size": int(group[1]) if group else None,
        "sparsity": float(sparsity[1]) if sparsity else pattern[1] if pattern else share,
        "pattern": pattern[0] if pattern else None,
        "seed": int(seed[1] or seed[2]) if seed else None,
        "parameters": parameters_of(base),
        "params": {
            "published": "comp-trust-sheet",
            "name": name,
            "source": re.sub(r"^(hf|openai)/", "", name) if method == "dense" else None,
            "mislabelled": notes,
        },
    }
    metrics: list[dict[str, Any]] = []
    for dimension, column in SHEET.items():
        score = _within(where, row, column, 100)
        metrics.append({"dimension": dimension, "metric": "score", "value": score})
        metrics.append({"dimension": dimension, "metric": "valid", "value": float(score is not None)})
        refusal = _number(where, row, f"{column} Ref")
        if refusal is not None:
            share = refusal if dimension in _FRACTIONS else refusal / 100
            if not 0 <= share <= 1:
                unit = "a fraction (0-1)" if dimension in _FRACTIONS else "percent (0-100)"
                raise BadInput(f"{column} Ref is {refusal:g}, expected {unit}", where=where)
            metrics.append({"dimension": dimension, "metric": "refusal", "value": share})
    for metric, column in (("mmlu", "MMLU"), ("average", "Average")):
        value = _within(where, row, column, 100)
        if value is not None:
            metrics.append({"dimension": UTILITY, "metric": metric, "value": value})
    return _Row(cell, metrics)


def _method_in(name: str) -> str | None:
    found = re.search(r"(awq|gptq|magnitude|sparsegpt|wanda|gblm)", name.lower())
    return _METHODS[found[1]] if found else None


# -- Beyond Perplexity ------------------------------------------------------------------------------------------------------


def _perplexity_row(where: str, row: Mapping[str, str]) -> _Row:
    base, stated, structure = (
        _named(where, row["base_model"], "base_model"),
        row["compression_method"].lower(),
        row["pruning_structure"],
    )
    if stated not in _METHODS:
        raise BadInput(f"unknown method {row['compression_method']!r}", where=where, fix=f"One of: {', '.join(_METHODS)}.")
    method = _METHODS[stated]
    ratio = _within(where, row, "compression_ratio", 1) or 0.0
    pruned = ratio > 0
    semi = _pattern(structure.partition(":")[2]) if structure.startswith("semistructured") else None
    cell = {
        "model": base,
        "revision": f"published:{base}",
        "method": method,
        "bits": 16 if method == "dense" else _BP_BITS.get(method),
        "sparsity": ratio if pruned else None,
        "pattern": (semi[0] if semi else "unstructured") if pruned else None,
        "parameters": parameters_of(base.replace("_", "-")),
        "params": {
            "published": "beyond-perplexity",
            "name": "/".join(row[k] for k in _BP_KEYS),
            "source": _BP_SOURCES.get(base) if method == "dense" else None,
            "mislabelled": [],
        },
    }
    metrics = []
    for column in row:
        if column in _BP_KEYS:
            continue
        group = next((g for prefix, g in BP_GROUPS.items() if column.startswith(prefix)), "other")
        value = _number(where, row, column)
        metrics.append({"dimension": group, "metric": column, "value": value})
        if column == "wikitext2":  # the perplexity of view `results`
            metrics.append({"dimension": UTILITY, "metric": "perplexity", "value": value})
    return _Row(cell, metrics)


def published_sources(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Hub id (lower case) -> dense published row, from rows of view ``results``."""
    out = {}
    for row in rows:
        if row["status"] == "published" and row["method"] == "dense":
            source = (json.loads(row["params"] or "{}")).get("source")
            if source:
                out[source.lower()] = row
    return out
