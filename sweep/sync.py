"""``sync``: publish a record to W&B (again), whatever W&B missed."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from ..actors.errors import BadInput
from .grid import config_of
from .results import load_results
from .wandb_sink import Publisher, folder_of, has_key, picture


def sync(uri: str) -> str:
    """Every cell of every sweep of the record as W&B runs; a run that exists is resumed under the same id. Returns a sentence."""
    results = load_results(uri)
    sweeps = results.record.sweeps()
    if not sweeps:
        raise BadInput(f"no sweep in {uri!r}", where="RESULTS", fix="Give the folder that `comptrust run` printed.")
    cells = {r["key"]: r for r in results.rows("select * from cells")} | {
        r["key"]: r for r in results.rows("select * from failed")
    }
    metrics: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for m in results.rows("select * from metrics"):
        metrics[m["key"]].append(m)
    sent, notes, everywhere = 0, [], True
    for sweep in sweeps:
        config = config_of(sweep)
        online = has_key() and config.wandb.mode != "disabled"
        everywhere &= online
        config = config.model_copy(
            update={"wandb": config.wandb.model_copy(update={"mode": "online" if online else "offline"})}
        )
        folder = folder_of(results.record, config.name)
        try:
            publisher = Publisher(config, sweep["id"], folder, sweep.get("labels", {}))
            publisher.open()
        except OSError as e:
            raise BadInput(
                f"W&B writes its runs to {folder!r}, and cannot: {e}",
                where="RESULTS",
                fix="Publish a copy that you may write to.",
            ) from e
        for key in [k for form in [sweep, *sweep.get("earlier", [])] for k in form["keys"]]:
            if key in cells:
                items = results.items([key]).to_pylist() if config.wandb.items else None
                publisher.cell({**cells[key], "metrics": metrics[key]}, items)
                sent += 1
        rows, found = picture(uri, sweep["keys"])
        publisher.frontier(rows)
        publisher.alarms(found)
        states = [cells[k]["status"] for k in sweep["keys"] if k in cells]
        figures = {f"cells/{state}": states.count(state) for state in ("done", "failed")}
        notes += publisher.close(0, {**figures, "cells/total": len(sweep["keys"])})
    where = "W&B" if not notes and everywhere else "offline runs (`wandb login` or WANDB_API_KEY publishes them)"
    return "; ".join([f"{sent} cells of {len(sweeps)} sweep(s) written to {where}", *notes])
