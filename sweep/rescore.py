"""``rescore``: every answer judged again and every metric again from the stored items, without a model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..actors.errors import BadInput
from ..actors.record import DIVERGENCE, UTILITY, Record, to_table
from .results import Results, _generation_keys, load_results

Row = dict[str, Any]
Question = tuple[str, str, int]  # dimension, item, sample


def rescore(uri: str) -> tuple[int, int]:
    """(cells rescored, answers judged otherwise than before). Outcome and score of every item, all metrics and flips are written
    again; what needs the model (perplexity, KL divergence, lm_eval tasks) stays as measured.

    Cells without items (published tables) keep what they have. Compacted cells become parts again: run ``compact`` after.
    Interrupted, it may be repeated. ``BadInput`` where only hashes of text were kept.
    """
    from .launch import check_writable

    results = load_results(uri)
    check_writable(results.record)
    if results.rows("select 1 as x from items where text is null and text_sha is not null limit 1"):
        raise BadInput(
            "only hashes of the answers were kept (evaluation.keep_text: false)",
            where=uri,
            fix="Run the sweep again with keep_text: true.",
        )
    changed = 0
    dense: dict[str, dict[Question, str]] = {}
    # A dense cell comes before those that are compared with it.
    cells = results.rows(
        "select * from results where status = 'done' and key in (select key from items) order by method != 'dense', key"
    )
    for cell in cells:
        stored = _stored(results, cell["key"])
        items = _judged(stored)
        differ = sum((a["outcome"], a["score"]) != (b["outcome"], b["score"]) for a, b in zip(stored, items, strict=True))
        changed += differ
        if cell["method"] == "dense":
            dense[cell["key"]] = {_question(r): r["outcome"] for r in items}
            if differ:
                _correct_reference(results.record, cell["key"], stored, items)
        metrics = _metrics(results, cell, items, dense.get(cell["dense_key"]))
        results.record.put_table(f"items/{cell['key']}.parquet", to_table("items", items))
        results.record.put_table(
            f"metrics/{cell['key']}.parquet", to_table("metrics", [{**m, "key": cell["key"]} for m in metrics])
        )
    if results._compacted():
        raise BadInput("a compaction ended meanwhile; it holds the old judgements", where="RESULTS", fix="Run rescore again.")
    if results.generations:
        # The old generations would shadow the parts, which must hold every cell before these go.
        for key in sorted(_generation_keys(results.record, results.generations)):
            _complete(results, key)
        for name in ("cells", "metrics", "items", "layers", "wide"):
            for gen in results.generations:
                results.record.delete(f"compact/{name}/{gen}.parquet")
    return len(cells), changed


def _stored(results: Results, key: str) -> list[Row]:
    """Items of a cell in the order in which they were written, the plan's."""
    return [{**r, "target": json.loads(r["target"]) if r["target"] else {}} for r in results.items([key]).to_pylist()]


def _judged(items: Sequence[Row]) -> list[Row]:
    from ..actors.evaluate import rejudge

    by: dict[str, list[Row]] = defaultdict(list)
    for row in items:
        by[row["dimension"]].append(row)
    judged = {_question(row): row for dimension, rows in by.items() for row in rejudge(dimension, rows)}
    return [judged[_question(row)] for row in items]


def _metrics(results: Results, cell: Row, items: Sequence[Row], dense: Mapping[Question, str] | None) -> list[Row]:
    """Of the judged items; and what was measured on the model, flips apart where the dense cell's items are here."""
    from ..actors.evaluate import TASKS
    from ..actors.evaluate.divergence import encode_outcomes, flip_rows

    by: dict[str, list[Row]] = defaultdict(list)
    for row in items:
        by[row["dimension"]].append(row)
    fresh = [m for dimension, rows in by.items() for m in TASKS[dimension].metrics(rows, cell["suite"])]
    kept = results.rows(
        "select * exclude (key) from metrics where key = ? and dimension in (?, ?)", [cell["key"], UTILITY, DIVERGENCE]
    )
    recount = cell["method"] != "dense" and dense is not None and dense.keys() == {_question(r) for r in items}
    if recount and any(m["metric"] == "flips" for m in kept):
        fresh += flip_rows(items, encode_outcomes([{"outcome": dense[_question(r)]} for r in items]))
        kept = [m for m in kept if m["metric"] != "flips"]
    made = [m._asdict() for m in fresh]
    names = {_name(m) for m in made}
    return [*made, *(m for m in kept if _name(m) not in names)]


def _question(row: Row) -> Question:
    return row["dimension"], row["item"], row["sample"]


def _name(metric: Row) -> tuple[str, str, str, str]:
    return metric["convention"], metric["dimension"], metric["scenario"], metric["metric"]


def _correct_reference(record: Record, key: str, stored: Sequence[Row], items: Sequence[Row]) -> None:
    """Outcomes in the dense cell's reference, so that the flips of cells still to run are counted by the same judgement."""
    from ..actors.evaluate.divergence import encode_outcomes

    path = f"reference/{key}.safetensors"
    tensors = record.get_tensors(path)
    if tensors is not None and tensors["outcomes"].equal(encode_outcomes(stored)):
        record.put_tensors(path, {**tensors, "outcomes": encode_outcomes(items)})


def _complete(results: Results, key: str) -> None:
    """Write those parts of a compacted cell that there are not, the mark last."""
    for name in ("layers", "items", "metrics", "cells"):
        if results.record.get_table(f"{name}/{key}.parquet") is None:
            table = results.sql(f"select * from {name} where key = ?", [key])
            results.record.put_table(f"{name}/{key}.parquet", to_table(name, table.to_pylist()))
