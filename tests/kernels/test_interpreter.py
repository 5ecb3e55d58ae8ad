"""Plain Triton kernels in Triton's interpreter against float64, odd shapes, poisoned guard bands, one-hot probes."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import kernel_cases as ref
import pytest
from comptrust.kernels.dispatch import KERNELS

pytest.importorskip("triton")
PLAIN = [k for k in KERNELS.values() if k.interpreted]


@pytest.fixture(scope="session")
def results() -> list:
    """One process: the interpreter is chosen when a kernel is decorated, so not here."""
    script = pathlib.Path(__file__).with_name("interpreted.py")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(script), *(k.name for k in PLAIN)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(("kernel", "format"), [(k.name, f) for k in PLAIN for f in k.formats])
def test_interpreted(results, kernel, format):
    cases = [r for r in results if r[:2] == [kernel, format]]
    measured = [r for r in cases if r[2] != "probe"]
    assert len(measured) >= 3
    assert len(cases) > len(measured)
    for _, _, dtype, shape, error in measured:
        assert error < ref.BOUND[dtype], (dtype, shape, error)
    for _, _, _, shape, wrong in (r for r in cases if r[2] == "probe"):
        assert wrong == 0, (shape, wrong)
