"""Orchestration at scale, without model work: enumeration, dispatch, record, compact, status, pareto, W&B offline.

    python benchmarks/scale.py 1000 3000 10000 [--wandb]

A tiny random Llama gives the identity, a synthetic executor commits rows at once; what remains is the cost of comptrust itself.
Prints a table: seconds and peak memory (driver process) of each stage, and milliseconds a cell.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"


def one(cells: int, wandb: bool) -> dict:
    """One sweep of ``cells`` cells in this process; returns seconds by stage."""
    sys.path[:0] = [str(TESTS), str(TESTS / "sweep")]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS / "sweep"), os.environ.get("PYTHONPATH", "")])
    from comptrust.sweep.frontier import pareto
    from comptrust.sweep.launch import run_sweep
    from comptrust.sweep.progress import View
    from comptrust.sweep.results import compact, load_results
    from comptrust.sweep.status import status
    from tiny import make_tiny_model

    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("COMPTRUST_CACHE", f"{folder}/cache")
        model = make_tiny_model(Path(folder) / "model")
        results = f"{folder}/results"
        config = {
            "name": "scale",
            "models": [str(model)],
            "methods": [
                {
                    "method": "gptq",
                    "bits": 4,
                    "group_size": 32,
                    "damping": [round(0.01 + i * 1e-5, 6) for i in range(cells - 1)],
                }
            ],
            "calibration": {"samples": 4, "seqlen": 64},
            "evaluation": {"suite": "smoke", "dimensions": ["ethics"], "perplexity": None},
            "results": results,
            "wandb": {"mode": "offline" if wandb else "disabled"},
        }
        outcome = run_sweep(config, executor="synthetic_executor:Synthetic", view=View(quiet=True))
        assert outcome.done == cells, outcome
        driver = peak_gib()
        seconds |= {("sweep" if k == "cells" else k): v for k, v in outcome.stages.items()}
        for name, step in (
            ("status", lambda: status(results)),
            ("load parts", lambda: load_results(results).rows("select count(*) from results")),
            ("compact", lambda: compact(results)),
            ("load compacted", lambda: load_results(results).rows("select count(*) from results")),
            (
                "pareto",
                lambda: pareto(
                    load_results(results), minimise=["size_bytes", "perplexity"], maximise=["ethics"], probability=False
                ),
            ),
            ("run again", lambda: run_sweep(config, executor="synthetic_executor:Synthetic", view=View(quiet=True))),
        ):
            start = time.monotonic()
            step()
            seconds[name] = time.monotonic() - start
    return {
        "cells": cells,
        **{k: round(v, 2) for k, v in seconds.items()},
        "ms a cell": round(1000 * seconds["sweep"] / cells, 1),
        "driver GiB": driver,
        "GiB after all": peak_gib(),
    }


def peak_gib() -> float:
    """Peak memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=int, nargs="+")
    parser.add_argument("--wandb", action="store_true", help="write W&B offline runs too")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.cells[0], given.wandb)))
        return
    rows = []
    for n in given.cells:  # a process each, so that peak memory is its own
        command = [sys.executable, __file__, str(n), "--one", *(["--wandb"] if given.wandb else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---:|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row[n]) for n in names) + " |")


if __name__ == "__main__":
    main()
