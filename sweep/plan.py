"""``plan``: what ``run`` would do. Loads no weights; estimates are formulas stated here, from shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..actors.cell import Cell
from ..actors.errors import BadInput
from ..actors.models import default_dtype
from ..actors.record import Record
from .config import SweepConfig
from .grid import checked, excluded, expand, facts, held, uninstalled
from .importer import parameters_of
from .names import distinct, of_cells

if TYPE_CHECKING:
    from ..actors.evaluate.run import EvaluationPlan

#: Sustained share of a GPU's dense bf16 peak in forward passes of compression and prefill (an H100 reaches about 40%), FLOP/s.
FLOPS = 400e12
#: Bytes per second read in decoding, per sequence step of a whole batch.
BANDWIDTH = 2.5e12
#: Forward passes over the calibration set that a method costs, and times one pass for statistics and solving.
PASSES = {
    "dense": 0, "rtn": 0, "magnitude": 0, "llm_int8": 0, "nf4": 0, "fp4": 0, "wanda": 1.5, "smoothquant": 1.5, "sparsegpt": 3, "gptq": 3,
    "awq": 4, "gblm": 6,
}  # fmt: skip
DECODE_BATCH = 64
#: What ``models.resolve`` says of a hub model that may exist though this machine cannot see it.
UNREACHABLE = ("the hub cannot be reached", " is gated")
CHARS_PER_TOKEN = 4


def plan(config: SweepConfig) -> dict[str, Any]:
    """Cells by model and method, what is done, impossible combinations with reasons, and estimates of GPU hours, memory and disk."""
    from ..actors import models

    try:
        grid = expand(config, installed=False)
    except BadInput as e:
        if not any(word in e.problem for word in UNREACHABLE):
            raise
        return _unresolved(config, e)
    prompt, notes = _prompt_tokens(grid.plan), list(grid.notes)
    record = Record(config.results)
    record.check_readable(where="results")
    done = record.done()
    per_model = []
    for name, model in grid.need.items():
        cells = [c for c in grid.cells if held(c) == name]
        ref = models.resolve(model.id, allow_bin=model.allow_bin, commit=cells[0].revision)
        params = parameters(shapes := models.load_config(ref))
        width = 4 if cells[0].dtype == "float32" else 2
        if (host := max(_host_bytes(c, shapes, width) for c in cells) / 1e9) >= 1:
            notes.append(f"{model.id}: gblm keeps {host:.0f} GB of calibration inputs in host memory, those of every block")
        seconds = sum(
            _seconds(c.method, _tokens(c), params, width, prompt, grid.plan.new_tokens) for c in cells if c.key not in done
        )
        n_done = sum(c.key in done for c in cells)
        kept = 4 if ref.path is not None and ref.path.suffix == ".gguf" else width  # GGUF is converted to float32
        per_model.append(_row(model.id, ref.revision, cells[0].dtype, params, len(cells), n_done, seconds, width, config, kept))
    names = of_cells(grid.cells)
    listed = [{"key": c.key, "model": c.model, "cell": names[c.key], "done": c.key in done} for c in grid.cells]
    return _answer(config, grid.plan, listed, [vars(s) for s in grid.skipped], per_model, notes)


def _prompt_tokens(evaluation: Any) -> float:
    chars = sum(len(m.content) for t in evaluation.tasks for i in t.items for m in t.task.messages(i))
    return chars / CHARS_PER_TOKEN


def _tokens(cell: Cell) -> int:
    return (cell.calibration or {}).get("samples", 0) * (cell.calibration or {}).get("seqlen", 0)


def _host_bytes(cell: Cell, model_config: Any, width: int) -> int:
    """Calibration inputs of all blocks and the gradients behind the last, which GBLM keeps in host memory; 0 for other methods."""
    text = model_config.get_text_config()
    return (text.num_hidden_layers + 2) * _tokens(cell) * text.hidden_size * width if cell.method == "gblm" else 0


def _seconds(method: str, calibration: float, params: int, width: int, prompt: float, generated: float) -> float:
    """GPU seconds of a cell: forward passes over calibration and prompts at FLOPS, decoding at BANDWIDTH."""
    forward = 2 * params * (calibration * PASSES.get(method, 1) + prompt) / FLOPS
    return forward + generated / DECODE_BATCH * params * width / BANDWIDTH


def _row(
    model: str, revision: str | None, dtype: str | None, params: int | None, cells: int, done: int, seconds: float | None, width: int,
    config: SweepConfig, kept: int = 2,
) -> dict[str, Any]:  # fmt: skip
    size = (params or 0) * width
    # Beside the dense model a worker holds a compressed copy, and a byte of codes a weight.
    held = 2 * size + (params or 0) if cells > 1 else 1.3 * size
    share = config.resources.cache_gb / len(config.models)
    cached = min(size * cells / 1e9, share)
    return {
        "model": model, "revision": revision, "dtype": dtype, "parameters": params, "cells": cells, "done": done,
        "memory_gb": round(held / 1e9 + 1, 1) if params else None,
        "gpu_hours": round(seconds / 3600, 2) if seconds is not None else None,
        "disk_gb": round(cached + (params or 0) * kept / 1e9, 1) if params else None,
    }  # fmt: skip


def _answer(
    config: SweepConfig, evaluation: EvaluationPlan, cells: list[dict[str, Any]], skipped: list[dict[str, Any]],
    per_model: list[dict[str, Any]], notes: list[str],
) -> dict[str, Any]:  # fmt: skip
    notes = [*notes, *(f"{e}: `run` needs it" for e in uninstalled(config))]
    return {
        "sweep": config.name,
        "results": config.results,
        "suite": config.evaluation.suite,
        "data": evaluation.data,
        "cells": len(cells),
        "done": sum(c["done"] for c in cells),
        "models": per_model,
        "list": cells,
        "skipped": skipped,
        "absent": list(config.absent),
        "note": "\n".join(notes) or None,
        "gpu_hours": round(sum(m["gpu_hours"] or 0 for m in per_model), 2),
        "disk_gb": round(sum(m["disk_gb"] or 0 for m in per_model), 1),
    }


def _unresolved(config: SweepConfig, why: BadInput) -> dict[str, Any]:
    """A plan for models that cannot be reached from here: cells counted without keys, sizes read from the names (``13b``)."""
    from ..actors import compress
    from ..actors.actor import cell_row
    from ..actors.evaluate.data import load_pack
    from ..actors.evaluate.run import plan_evaluation

    evaluation = plan_evaluation(config.evaluation, load_pack())
    prompt = _prompt_tokens(evaluation)
    blocks = [checked(block, i) for i, block in enumerate(config.methods)]
    per_model, cells = [], []
    for model in config.models:
        params = parameters_of(model.id)
        base = {"model": model.id, "revision": "", "dtype": model.dtype or default_dtype(), "suite": config.evaluation.suite}
        mine = [Cell(**base, method="dense")]
        seconds = _seconds("dense", 0, params or 0, 2, prompt, evaluation.new_tokens)
        for i, (block, combinations) in enumerate(blocks):
            if block.method == "dense":
                continue
            method = compress.METHODS[block.method]
            backend = block.backend if block.backend != "comptrust" else method.backend
            axes = [c for c, _ in config.calibrations(i)] if method.needs_calibration else [None]
            for filled in combinations:
                for c in axes:
                    spec = c.model_dump(mode="json") if c else None
                    cell = Cell(**base, method=block.method, params=filled, backend=backend, calibration=spec)
                    if excluded(config, facts(cell)):
                        continue
                    tokens = c.samples * c.seqlen if c else 0
                    mine.append(cell)
                    seconds += _seconds(block.method, tokens, params or 0, 2, prompt, evaluation.new_tokens)
        names = distinct([cell_row(c) for c in mine], [c.label for c in mine])
        cells += [{"key": None, "model": model.id, "cell": name, "done": False} for name in names]
        per_model.append(_row(model.id, None, model.dtype, params, len(mine), 0, seconds if params else None, 2, config))
    return _answer(
        config,
        evaluation,
        cells,
        [],
        per_model,
        [*evaluation.notes, f"{why}: cells have no keys yet, sizes are read from the names"],
    )


def parameters(config: Any) -> int:
    """Parameters of a decoder from its configuration alone: a model on the meta device, no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())
