"""``export``: the checkpoint of a recorded cell, from the artefact cache or compressed again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..actors.cell import Cell
from ..actors.errors import BadInput
from ..actors.models import resolve
from .config import ModelConfig, SweepConfig
from .grid import config_of, expand
from .results import load_results


def find_cell(uri: str, prefix: str) -> tuple[Cell, dict, SweepConfig]:
    """The cell behind a key of the record, its row of ``results``, and the sweep that holds it.

    It is known by its weights: neither the sweep's other models, the calibration of other methods nor the data that it was evaluated
    on need be here, nor a GPU, which decides on the dtype where the sweep names none; and its own model may have another name by now.
    """
    results = load_results(uri)
    key = results.find(prefix)
    row = results.rows("select * from results where key = ?", [key])[0]
    for sweep in results.record.sweeps():
        for form in [sweep, *sweep.get("earlier", [])]:
            if key not in form["keys"]:
                continue
            config = config_of(form)
            same = tuple(m for m in config.methods if m.method == row["method"])
            mine = config.model_copy(update={"models": (_model(config, row),), "methods": same})
            found = expand(mine, installed=False, commit=row["revision"])
            for cell in found.cells:
                if cell.artifact_key == row["artifact_key"]:
                    asked = {"suite": row["suite"], "evaluation": row["evaluation"]}
                    return cell.model_copy(update=asked), row, config
    raise BadInput(
        f"cell {key} cannot be made again from here: its model, calibration text or method has changed, or it was imported",
        where="CELL", fix="Run `comptrust compress` with its parameters (comptrust query RESULTS \"select params from cells\").",
    )  # fmt: skip


def _model(config: SweepConfig, row: dict) -> ModelConfig:
    """The model of a sweep that a row is of, in the row's dtype: by its name, or by its content where it was moved since."""
    there = [m for m in config.models if m.dtype in (None, row["dtype"])]
    for model in [m for m in there if m.id == row["model"]] or there:
        with suppress(BadInput):
            ref = resolve(model.id, allow_bin=model.allow_bin, commit=row["revision"])
            named = (
                ref.kind != "hub" or ref.spec.partition("@")[0] == row["model"].partition("@")[0]
            )  # every one takes the commit
            if named and ref.revision == row["revision"]:
                return model.model_copy(update={"dtype": row["dtype"]})
    raise BadInput(
        f"the model {row['model']!r} of this cell is not here any more, or has changed",
        where="CELL", fix="Put it back, or name its new place in the sweep and run that: it computes nothing twice",
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
    return str(done)
