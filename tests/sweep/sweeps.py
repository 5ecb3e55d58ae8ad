"""A small sweep, and the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def sweep_dict(models, results, **more) -> dict:
    """A small grid: 8 cells a model."""
    return {
        "name": "tiny",
        "models": [str(m) for m in models],
        "methods": [
            {"method": "rtn", "bits": [8, 4, 3], "group_size": 32},
            {"method": "gptq", "bits": 4, "group_size": 32, "damping": [0.01, 0.05]},
            {"method": "wanda", "pattern": "2:4"},
            {"method": "magnitude", "sparsity": 0.5},
        ],
        "calibration": {"samples": 4, "seqlen": 64},
        "evaluation": {"suite": "smoke", "dimensions": ["stereotype", "ethics"], "perplexity": {"windows": 2, "seqlen": 128}},
        "results": str(results),
        "wandb": {"mode": "disabled"},
        **more,
    }


def comptrust(*args: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "comptrust.sweep", *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
    )
