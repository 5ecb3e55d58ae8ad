"""``export``: the checkpoint of a recorded cell, from the artefact cache or compressed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..actors.cell import Cell
from ..actors.errors import BadInput
from .config import SweepConfig
from .grid import config_of, expand
from .results import load_results


def find_cell(uri: str, prefix: str) -> tuple[Cell, dict, SweepConfig]:
    """The cell behind a key of the record, its row of ``results``, and the sweep that holds it.

    It is known by its weights: neither the sweep's other models nor the data that it was evaluated on need be here, nor a GPU, which
    decides on the dtype where the sweep names none.
    """
    results = load_results(uri)
    key = results.find(prefix)
    row = results.rows("select * from results where key = ?", [key])[0]
    for sweep in results.record.sweeps():
        for form in [sweep, *sweep.get("earlier", [])]:
            if key not in form["keys"]:
                continue
            config = config_of(form)
            mine = tuple(
                m.model_copy(update={"dtype": row["dtype"]})
                for m in config.models
                if m.id == row["model"] and m.dtype in (None, row["dtype"])
            )
            found = expand(config.model_copy(update={"models": mine[:1]}), installed=False, commit=row["revision"])
            for cell in found.cells:
                if cell.artifact_key == row["artifact_key"]:
                    asked = {"suite": row["suite"], "evaluation": row["evaluation"]}
                    return cell.model_copy(update=asked), row, config
    raise BadInput(
        f"cell {key} cannot be made again from here: its model, calibration text or method has changed, or it was imported",
        where="CELL", fix="Run `comptrust compress` with its parameters (comptrust query RESULTS \"select params from cells\").",
    )  # fmt: skip


def export_cell(
    uri: str, prefix: str, output: Path, format: str = "auto", progress: Callable[[str, int, int], None] | None = None
) -> str:
    """Write the checkpoint of a cell with its measured row on the card; returns a sentence with the place and the format."""
    from ..actors import models
    from ..actors.actor import Worker, WorkerConfig
    from ..actors.compress.export import check_format, check_output, export

    check_output(output)
    cell, row, config = find_cell(uri, prefix)
    allow_bin = tuple(m.id for m in config.models if m.allow_bin)
    ref = models.resolve(cell.model, allow_bin=cell.model in allow_bin, commit=cell.revision)
    check_format(format, cell.method, cell.params, models.load_config(ref), cell.backend)
    worker = Worker(WorkerConfig(record=uri, evaluation={}, allow_bin=allow_bin), progress)
    worker.prepare(cell)
    if worker.error is not None:
        raise worker.error
    assert worker.prepared is not None
    done = export(worker.prepared[1], worker.tokenizer, output, format=format, cell=cell, measured=row)
    return "\n".join([f"{done.path}: {done.format}, {done.size_bytes / 1e6:.0f} MB", *done.notes])
