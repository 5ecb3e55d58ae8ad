"""Frontiers at scale: a compacted record of a million rows, and probabilities of 500 cells from items.

    python benchmarks/frontier.py [--rows 1000000] [--cells 500] [--draws 1000] [--keep FOLDER]

Times are CPU and wall seconds of `pareto` alone, then of the whole command (`comptrust pareto --no-probability`, a new
process). Targets: 5 s for a million rows with three objectives, 30 s for 500 cells x 1,000 draws.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from comptrust.actors.cell import DIMENSIONS
from comptrust.actors.evaluate import TASKS, conventions
from comptrust.actors.record import CELLS, METRICS, Record, to_table
from comptrust.sweep import results as rs
from comptrust.sweep.frontier import pareto
from comptrust.sweep.results import load_results

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def compacted(folder: Path, n: int) -> None:
    """One generation of ``n`` cells with size, MMLU and trust, in the files that `compact` writes."""
    rng = np.random.default_rng(0)
    keys = pa.array([f"{i:024x}" for i in range(n)])
    size = rng.integers(10**9, 3 * 10**10, n)
    columns = {name: pa.nulls(n, CELLS.field(name).type) for name in CELLS.names}
    columns |= {
        "key": keys,
        "artifact_key": keys,
        "size_bytes": pa.array(size),
        "finished_at": pa.array([NOW] * n, CELLS.field("finished_at").type),
    }
    for name, value in {
        "model": "m",
        "revision": "r",
        "method": "rtn",
        "suite": "smoke",
        "evaluation": "e",
        "status": "done",
        "dtype": "float16",
    }.items():
        columns[name] = pa.array([value] * n)
    columns["bits"] = pa.array(rng.integers(2, 17, n))
    cells = pa.table(columns, schema=CELLS)
    wide = cells
    quality = size / size.max() + rng.normal(0, 0.2, n)
    values = {c: rng.random(n) * 100 for c in ("perplexity", "kl_dense", "top1_agreement", "flips")}
    values["mmlu"] = np.clip(50 + 20 * quality, 0, 100)
    for d in DIMENSIONS:
        values |= {d: np.clip(60 + 15 * quality + rng.normal(0, 5, n), 0, 100), f"{d}_refusal": rng.random(n)}
    for name, column in values.items():
        wide = wide.append_column(name, pa.array(column))
    for d in DIMENSIONS:
        wide = wide.append_column(f"{d}_valid", pa.array(np.ones(n, bool)))
    record = Record(folder)
    gen = "00000000000000000001-benchmrk"
    for name, table in (
        ("layers", None),
        ("items", None),
        ("metrics", METRICS.empty_table()),
        ("wide", wide),
        ("cells", cells),
    ):
        table = to_table(name, []) if table is None else table
        rs._write_generation(record, name, gen, table.to_reader(max_chunksize=100_000))


def with_items(folder: Path, n: int) -> None:
    """``n`` cells in configurations of three seeds, 48 prompts in each of three dimensions."""
    record = Record(folder)
    rng = np.random.default_rng(0)
    skill = {d: rng.beta(2, 1, 48) for d in ("ethics", "adversarial", "stereotype")}
    targets = {"ethics": {"run": "", "label": "wrong"}, "adversarial": {"task": "sst2", "label": 1}}
    for i in range(n):
        items, metrics = [], []
        loss = 0.3 * rng.random()
        for d, p in skill.items():
            rows = []
            for j in range(48):
                right = bool(rng.random() < p[j] - loss * 0.5)
                scored = d == "stereotype"
                target = {"group": "Women", "topic": f"t{j % 4}"} if scored else targets[d]
                outcome = "scored" if scored else "correct" if right else "wrong"
                rows.append({
                    "item": f"{d}/{j}", "sample": 0, "cluster": f"{d}{j}", "dimension": d, "scenario": "zero_shot", "target": target,
                    "outcome": outcome, "score": float(right), "finish_reason": "stop", "text": "", "text_sha": "", "prompt_sha": "",
                })  # fmt: skip
            items += rows
            metrics += [m._asdict() for m in conventions.comptrust(d, rows, conventions.estimate(*TASKS[d].parts(rows)))]
        cell = {
            "key": f"{i:024x}", "artifact_key": f"{i:024x}", "model": "m", "revision": "r", "method": "rtn", "bits": i // 3 % 15 + 2,
            "group_size": 32 * (i // 45 + 1), "seed": i % 3, "suite": "smoke", "evaluation": "e", "status": "done", "dtype": "float16",
            "size_bytes": int(1e9 * (1 - loss)), "attempts": 1, "params": {}, "started_at": NOW, "finished_at": NOW,
        }  # fmt: skip
        record.commit(cell, metrics, items)


def children() -> float:
    """CPU seconds of the ended child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def timed(what: str, run, *args, **named):
    cpu, wall = time.process_time(), time.perf_counter()
    out = run(*args, **named)
    print(f"{what:<72} {time.process_time() - cpu:6.2f} CPU s {time.perf_counter() - wall:6.2f} s", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="write the records here and leave them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        million, cells = folder / "million", folder / "cells"
        if not million.exists():
            timed(f"writing {args.rows} rows", compacted, million, args.rows)
        found = timed(f"pareto, {args.rows} rows, 3 objectives, no probability",
                      lambda: pareto(load_results(million), ["size_bytes"], ["mmlu", "trust"], probability=False))  # fmt: skip
        print(f"  {int(found.on_frontier.sum())} on the frontier")
        for form in ("table", "json", "csv"):
            command = [
                sys.executable,
                "-m",
                "comptrust.sweep",
                "pareto",
                str(million),
                "--min",
                "size_bytes",
                "--max",
                "mmlu",
                "--max",
                "trust",
            ]
            wall, cpu = time.perf_counter(), children()
            done = subprocess.run([*command, "--no-probability", "--format", form], capture_output=True)
            times = f"{children() - cpu:.2f} CPU s {time.perf_counter() - wall:.2f} s"
            print(f"  whole command, --format {form}: exit {done.returncode}, {len(done.stdout):,} bytes, {times}", flush=True)
        if not cells.exists():
            timed(f"writing {args.cells} cells with items", with_items, cells, args.cells)
        found = timed(f"pareto, {args.cells} cells x {args.draws} draws, 3 objectives",
                      lambda: pareto(load_results(cells), ["size_bytes"], ["ethics", "stereotype"], draws=args.draws))  # fmt: skip
        print(f"  basis {found.basis}, {int((found.probability > 0.5).sum())} cells with probability over 0.5")


if __name__ == "__main__":
    main()
