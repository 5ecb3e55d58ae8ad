"""``plan``: what ``run`` would do. Loads no weights; estimates are formulas stated here, from shapes alone."""

from __future__ import annotations

from typing import Any

from ..actors.record import Record
from .config import SweepConfig
from .grid import expand

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
CHARS_PER_TOKEN = 4


def plan(config: SweepConfig) -> dict[str, Any]:
    """Cells by model and method, what is done, impossible combinations with reasons, and estimates of GPU hours, memory and disk."""
    from ..actors import models

    grid = expand(config)
    prompt = sum(len(text) for text in grid.plan.item_texts()) / CHARS_PER_TOKEN
    record = Record(config.results)
    done = record.done()
    per_model = []
    hours = disk = 0.0
    for model in grid.need:
        ref = models.resolve(model)
        params = parameters(models.load_config(ref))
        cells = [c for c in grid.cells if c.model == model]
        width = {"float32": 4}.get(cells[0].dtype, 2)
        generated = grid.plan.new_tokens
        seconds = 0.0
        for c in cells:
            if c.key in done:
                continue
            tokens = (c.calibration or {}).get("samples", 0) * (c.calibration or {}).get("seqlen", 0)
            seconds += 2 * params * tokens * PASSES.get(c.method, 1) / FLOPS
            seconds += 2 * params * prompt / FLOPS + generated / DECODE_BATCH * params * width / BANDWIDTH
        cached = params * width if config.resources.cache_gb else 0
        mine = {
            "model": model, "revision": ref.revision, "parameters": params, "cells": len(cells),
            "done": sum(c.key in done for c in cells),
            "memory_gb": round(params * width * 1.3 / 1e9 + 1, 1),
            "gpu_hours": round(seconds / 3600, 2),
            "disk_gb": round(min(cached * len(cells) / 1e9, config.resources.cache_gb) + params * width / 1e9, 1),
        }  # fmt: skip
        hours += seconds / 3600
        disk += mine["disk_gb"]
        per_model.append(mine)
    return {
        "sweep": config.name,
        "results": config.results,
        "suite": config.evaluation.suite,
        "cells": len(grid.cells),
        "done": sum(k in done for k in grid.keys),
        "models": per_model,
        "list": [{"key": c.key, "model": c.model, "cell": c.label, "done": c.key in done} for c in grid.cells],
        "skipped": [vars(s) for s in grid.skipped],
        "absent": list(config.absent),
        "gpu_hours": round(hours, 2),
        "disk_gb": round(disk, 1),
    }


def parameters(config: Any) -> int:
    """Parameters of a decoder from its configuration alone: a model on the meta device, no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())
