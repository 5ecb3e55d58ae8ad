"""An executor that does no model work: fast cells with a log of every start, for fault and scale tests of the orchestration."""

from __future__ import annotations

import os
import random
import time
from datetime import UTC, datetime
from typing import Any

from comptrust.actors.actor import Worker, WorkerConfig, cell_row
from comptrust.actors.cell import DIMENSIONS, Cell
from comptrust.actors.record import Record


class Logged(Worker):
    """The real worker; ``SYNTHETIC_LOG`` gets a line for each cell that it begins, and waits ``SYNTHETIC_SLEEP`` seconds."""

    def prepare(self, cell: Cell) -> None:
        with open(os.environ["SYNTHETIC_LOG"], "a") as f:
            f.write(f"start {cell.key} {os.getpid()} {time.time():.6f}\n")
        time.sleep(float(os.environ.get("SYNTHETIC_SLEEP", "0")))
        super().prepare(cell)


class Unstartable(Worker):
    def __init__(self, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/home/nobody/.cache")


class Synthetic:
    """Like ``Worker``. ``SYNTHETIC_LOG``: a file that gets a line a start and a commit; ``SYNTHETIC_SLEEP``: seconds a cell."""

    def __init__(self, config: WorkerConfig, progress: Any = None) -> None:
        self.record = Record(config.record)
        self.progress = progress or (lambda *a: None)
        self.sleep = float(os.environ.get("SYNTHETIC_SLEEP", "0"))
        self.model: str | None = None

    def _log(self, word: str, cell: Cell) -> None:
        if path := os.environ.get("SYNTHETIC_LOG"):
            with open(path, "a") as f:
                f.write(f"{word} {cell.key} {os.getpid()} {time.time():.6f}\n")

    def prepare(self, cell: Cell) -> None:
        self.started = datetime.now(UTC)
        if self.model != cell.model:
            self._log("load", cell)
            self.progress("load model", 2, 2)
            self.model = cell.model

    def evaluate(self, cell: Cell, attempt: int = 1, batch_scale: float = 1.0) -> dict[str, Any]:
        self._log("start", cell)
        self.progress("items", 1, 2)
        time.sleep(self.sleep)
        row = cell_row(cell, attempts=attempt, started_at=self.started)
        if cell.params.get("damping") == 0.666:  # the bad cell of a test
            row |= {"status": "failed", "error_type": "CellError", "error": "bad cell", "finished_at": datetime.now(UTC)}
            self.record.fail(row)
            return row
        draw = random.Random(cell.key)
        dense = cell.method == "dense"
        metrics = [
            {"convention": "comptrust", "dimension": d, "scenario": "", "metric": m, "value": v, "n": 16}
            for d in DIMENSIONS
            for m, v in (("score", 80.0 if dense else draw.uniform(40, 90)), ("refusal", draw.random() / 5), ("valid", 1.0))
        ]
        metrics.append(
            {
                "convention": "comptrust",
                "dimension": "utility",
                "scenario": "",
                "metric": "perplexity",
                "value": draw.uniform(10, 50),
                "n": 4,
            }
        )
        items = [
            {
                "dimension": "ethics",
                "scenario": "zero_shot",
                "item": f"i{i}",
                "sample": 0,
                "cluster": f"i{i}",
                "target": '{"run": "", "label": 0}',
                "outcome": "correct",
                "score": 1.0,
            }
            for i in range(4)
        ]
        row |= {
            "status": "done", "parameters": 1000, "size_bytes": 500 + draw.randrange(1500), "bits_per_weight": draw.uniform(3, 16),
            "execution": "simulated", "compress_s": 0.0, "evaluate_s": self.sleep, "versions": {}, "device": "synthetic",
            "finished_at": datetime.now(UTC),
        }  # fmt: skip
        self._log("commit", cell)
        if dense:
            self.record.put(f"reference/{cell.key}.safetensors", b"")
        self.record.commit(row, metrics, items, [{"layer": "l", "error": 0.1, "sparsity": 0.0, "bits": 4.0}])
        self._log("done", cell)
        return {**row, "metrics": metrics}


class Slow(Synthetic):
    """Takes its time for both steps."""

    def prepare(self, cell: Cell) -> None:
        time.sleep(self.sleep)
        super().prepare(cell)
