"""A driver process for fault tests: python drive.py SWEEP.yaml RESULTS [--address A]; runs the sweep with the
executor of synthetic_executor.py that EXECUTOR names (Synthetic)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

from comptrust.actors.errors import BadInput
from comptrust.sweep.launch import run_sweep

if __name__ == "__main__":
    sweep, results, *rest = sys.argv[1:]
    try:
        outcome = run_sweep(
            sweep, results=results, address=rest[1] if rest else None,
            executor=f"synthetic_executor:{os.environ.get('EXECUTOR', 'Synthetic')}",
            overrides=[o for o in os.environ.get("SWEEP_SET", "").split(";") if o],
        )  # fmt: skip
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps({**vars(outcome), "exit_code": outcome.exit_code}))
    sys.exit(outcome.exit_code)
