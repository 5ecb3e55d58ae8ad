"""Every kernel compiled for sm_90 without a GPU, as it would be launched: spills, memory, instructions and their number a weight.

Budgets are in ``kernels/budgets.json``, set a few per cent above what Triton 3.6 and 3.9 make of them; ``measure.py`` prints them all.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")
measure = pytest.importorskip("measure")
BUDGETS = json.loads(measure.BUDGETS.read_text())


def test_every_kernel_has_a_budget():
    from comptrust.kernels.dispatch import KERNELS

    assert {measure.key(*case) for case in measure.CASES} == set(BUDGETS)
    assert {(name, format) for name, format, _ in measure.CASES} >= {
        (k.name, k.formats[0]) for k in KERNELS.values() if k.triton
    } - {
        ("int_mma", "int3"),
        ("int_dot", "int3"),
    }


@pytest.mark.parametrize("case", measure.CASES, ids=lambda c: measure.key(*c))
def test_gates(case):
    budget = BUDGETS[measure.key(*case)]
    launch, sass, per_weight, limit = measure.measure(*case)
    assert sass.count("LDL") == sass.count("STL") == sass.stack == 0, "spills"
    assert launch.kernel.metadata.shared <= 227 * 1024
    assert sass.registers <= budget["registers"]
    assert sass.count(budget["loads"]), "weights are not read in whole vectors"
    if "mma" in budget:
        assert sass.count(budget["mma"]), sorted(set(sass.every))
    assert sass.loop
    assert per_weight <= budget["instructions"], (per_weight, sass.mix)
    # What claims to be fast must leave room under the issue limit of its bytes; the others say why they do not.
    assert ("above_limit" in budget) == (per_weight > limit), (per_weight, limit)
    if case[0].endswith("_mma"):
        assert "convert_layout" not in launch.kernel.asm["ttgir"], "a fragment would move between lanes"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 100, 120])
@pytest.mark.parametrize("case", [c for c in measure.CASES if c[2] == 1], ids=lambda c: measure.key(*c))
def test_other_capabilities_compile(case, capability):
    """``dispatch.CAPABILITY`` claims 8.0 and newer."""
    _, sass, _, _ = measure.measure(*case, capability=capability)
    assert sass.count("LDL") == sass.count("STL") == sass.stack == 0


def test_kernels_import_without_triton():
    """Formats, reference and modules on a bare machine; asking for a kernel says what is missing."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('ray', 'wandb', 'duckdb', 'transformers', 'triton'):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == 'triton' else real(name, package)
from comptrust.kernels import formats, layouts, matmul, modules, dispatch
packed = formats.pack(torch.eye(8).half(), '2:4')
assert torch.equal(matmul.matmul(torch.eye(8).half(), packed), torch.eye(8).half())
try:
    matmul.matmul(torch.eye(8).half(), packed, 'triton')
except ValueError as e:
    assert 'needs triton' in str(e), e
else:
    raise SystemExit('no error')
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
