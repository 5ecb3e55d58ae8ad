"""``rescore``: every metric again from the stored items, without a model."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from ..actors.errors import BadInput
from ..actors.record import DIVERGENCE, UTILITY, to_table
from .results import load_results


def rescore(uri: str) -> int:
    """Recompute the metrics of every cell from its items; utility and divergence, which need the model, stay as measured.

    Compacted cells become parts again where their metrics are rewritten, so run ``compact`` after. ``BadInput`` where only hashes
    of text were kept.
    """
    from ..actors.evaluate import rescore_rows

    results = load_results(uri)
    cells = results.rows("select * from cells where status = 'done' order by key")
    if results.rows("select 1 as x from items where text is null and text_sha is not null limit 1"):
        raise BadInput(
            "only hashes of the answers were kept (evaluation.keep_text: false)",
            where=uri,
            fix="Run the sweep again with keep_text: true.",
        )
    record = results.record
    for cell in cells:
        items = results.items([cell["key"]]).to_pylist()
        kept = results.rows(
            "select * exclude (key) from metrics where key = ? and dimension in (?, ?)", [cell["key"], UTILITY, DIVERGENCE]
        )
        by: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for item in items:
            by[item["dimension"]].append({**item, "target": json.loads(item["target"]) if item["target"] else {}})
        metrics = [m._asdict() for d, rows in by.items() if d != "mmlu" for m in rescore_rows(d, rows, cell["suite"])]
        known = {(m["convention"], m["dimension"], m["scenario"], m["metric"]) for m in kept}
        if "mmlu" in by:
            fresh = [m._asdict() for m in rescore_rows("mmlu", by["mmlu"], cell["suite"])]
            names = {(m["convention"], m["dimension"], m["scenario"], m["metric"]) for m in fresh}
            kept = [m for m in kept if (m["convention"], m["dimension"], m["scenario"], m["metric"]) not in names & known]
            metrics += fresh
        rows = [{**m, "key": cell["key"]} for m in [*metrics, *kept]]
        record.put_table(f"metrics/{cell['key']}.parquet", to_table("metrics", rows))
        for name in (
            "items",
            "layers",
            "cells",
        ):  # a compacted cell has no parts: write them, so that the part stands above the generation
            if record.get_table(f"{name}/{cell['key']}.parquet") is None:
                table = results.sql(f"select * from {name} where key = ?", [cell["key"]])
                record.put_table(f"{name}/{cell['key']}.parquet", to_table(name, table.to_pylist()))
    if results.generations:
        # Parts now hold every cell; the old generations would shadow them.
        for name in ("cells", "metrics", "items", "layers", "wide"):
            for gen in results.generations:
                record.delete(f"compact/{name}/{gen}.parquet")
    return len(cells)
