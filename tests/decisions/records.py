"""Small records for the decision tests: own published-style tables, and cells with items that the tasks score themselves."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from comptrust.actors.cell import DIMENSIONS, digest
from comptrust.actors.evaluate import TASKS, conventions
from comptrust.actors.record import UTILITY, Record
from comptrust.sweep.importer import SHEET

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def published() -> Path | None:
    """Folder of the published tables: COMPTRUST_PUBLISHED, or beside the data pack; None where there is none."""
    data = os.environ.get("COMPTRUST_DATA")
    for folder in (os.environ.get("COMPTRUST_PUBLISHED"), data and f"{data}/../published"):
        if folder and (Path(folder) / "comp_trust_num_sheet.csv").exists():
            return Path(folder)
    return None


def sheet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A table in the sheet's form. A row: model, method, bits, name, mmlu, the eight dimensions (default 60), refusals
    (fractions)."""
    columns = [
        "Base Model",
        "Compression Method",
        "Method Subtype",
        "Sparsity/bits",
        "Model",
        *(f"{c} Ref" for c in SHEET.values()),
    ]
    columns += ["MMLU", *SHEET.values(), "Average"]
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        for r in rows:
            dims = {d: r.get(d, 60.0) for d in DIMENSIONS}
            line = {
                "Base Model": r["model"],
                "Compression Method": "any",
                "Method Subtype": r["method"],
                "Sparsity/bits": r["bits"],
            }
            line |= {"Model": r["name"], "MMLU": r["mmlu"], **{SHEET[d]: v for d, v in dims.items()}}
            for d, c in SHEET.items():
                share = r.get(f"{d}_refusal", 0.0)
                line[f"{c} Ref"] = share if d in ("toxicity", "fairness") else 100 * share
            mean = (r["mmlu"] + sum(v for v in dims.values() if v != "")) / 9 if "" not in dims.values() else ""
            line["Average"] = r.get("average", round(mean, 1) if mean != "" else "")
            writer.writerow(line)
    return path


def answers(dimension: str, right: Sequence[bool | None], samples: int = 1) -> list[dict[str, Any]]:
    """Item rows of ``ethics`` or ``adversarial`` (one prompt each; None: refused) or ``stereotype`` (``samples`` of each
    prompt)."""
    rows = []
    for i, value in enumerate(right):
        row = {
            "item": f"{dimension}/{i // samples}",
            "sample": i % samples,
            "cluster": f"c{i // samples}",
            "dimension": dimension,
        }
        row |= {"text": "", "text_sha": "0", "prompt_sha": "0", "finish_reason": "stop"}
        if dimension == "ethics":
            row |= {"scenario": "zero_shot", "target": {"run": "", "label": "wrong"}}
        elif dimension == "adversarial":
            row |= {"scenario": "alpaca/sst2", "target": {"task": "sst2", "label": 1}}
        elif dimension == "stereotype":
            row |= {"scenario": "benign", "target": {"group": "Women", "topic": f"t{i // samples % 4}"}}
        else:
            raise ValueError(dimension)
        if value is None:
            row |= {"outcome": "refused", "score": None}
        elif dimension == "stereotype":
            row |= {"outcome": "scored", "score": float(value)}
        else:
            row |= {"outcome": "correct" if value else "wrong", "score": float(value)}
        rows.append(row)
    return rows


def write_cell(record: Record, method: str, items: Mapping[str, Sequence[dict[str, Any]]], **columns: Any) -> str:
    """A finished cell whose metrics follow from ``items`` (dimension -> rows) by the tasks' formulas. Returns its key."""
    utility = {k: columns.pop(k) for k in ("mmlu", "perplexity") if k in columns}
    cell = {
        "model": "acme/lm-1b",
        "revision": "r1",
        "method": method,
        "params": {},
        "backend": "comptrust",
        "dtype": "float32",
        "suite": "standard",
        "evaluation": "e1",
        "status": "done",
        "attempts": 1,
        "parameters": 1_000_000_000,
        "started_at": NOW,
        "finished_at": NOW,
        **columns,
    }
    cell["key"] = digest({k: str(v) for k, v in cell.items()})
    cell.setdefault("artifact_key", cell["key"])
    metrics = [
        m._asdict()
        for d, rows in items.items()
        for m in (
            TASKS[d].metrics(rows, "standard")
            if d == "fairness"
            else conventions.comptrust(d, rows, conventions.estimate(*TASKS[d].parts(rows)))
        )
        if m.convention == "comptrust"
    ]
    metrics += [
        {"convention": "comptrust", "dimension": UTILITY, "scenario": "", "metric": k, "value": v, "n": 1}
        for k, v in utility.items()
    ]
    layers = (
        [{"layer": f"layers.{i}", "error": 0.01 * i, "sparsity": 0.0, "bits": 4.0} for i in range(3)]
        if method != "dense"
        else []
    )
    record.commit(cell, metrics, [r for rows in items.values() for r in rows], layers)
    return cell["key"]
