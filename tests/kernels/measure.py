"""What the compiler makes of each kernel at the shapes it is dispatched for. ``python measure.py`` prints the table of docs/kernels.md."""

from __future__ import annotations

import importlib
import json
import pathlib

import compiled
import kernel_cases as ref
import torch
import triton
from comptrust.kernels import dispatch
from comptrust.kernels.formats import bits_per_weight, pack
from comptrust.kernels.layouts import arrange

BUDGETS = pathlib.Path(dispatch.__file__).with_name("budgets.json")
#: kernel, format, tokens; 1024 x 4096 bfloat16, group 128: widths as real ones are (whole steps, multiples of 16).
CASES = [
    ("sp24_mma", "2:4", 1), ("sp24_mma", "2:4", 16), ("sp24_mma", "2:4", 64),
    ("int_mma", "int4", 1), ("int_mma", "int4", 16), ("int_mma", "int4", 32),
    ("int_mma", "int8", 1), ("int_mma", "int3", 1), ("int_mma", "int3", 16),
    ("int_mma", "2:4+int4", 1), ("int_mma", "2:4+int4", 16), ("int_mma", "2:4+int4", 32),
    ("nm_gemv", "8:16", 1), ("nm_gemv", "4:8", 4), ("nm_gemv", "2:4", 1), ("nm_gemv", "2:4", 4),
    ("slice_gemv", "bitmap", 1), ("slice_gemv", "bitmap", 4),
    ("sp24_dot", "2:4", 16),
    ("int_dot", "int4", 16), ("int_dot", "2:4+int4", 16),
]  # fmt: skip
SPARSITY = 0.6  # of the bitmap case


def packed_case(name: str, format: str, rows: int = 64, columns: int = 4096):
    W, kw = ref.weight((rows, columns), format, dtype=torch.bfloat16, group_size=128, sparsity=SPARSITY)
    return arrange(pack(W, format, **kw), dispatch.KERNELS[name].layout)


def measure(name: str, format: str, tokens: int, capability: int = 90):
    """The launch, its SASS, instructions a weight in the main loop, and the most the weight's bytes allow.

    The limit is (design rule) 132 multiprocessors x 4 warp instructions a clock x 1.98 GHz over 4.3 TB/s: 7.79 thread instructions
    a byte, of which a 16-bit dense weight could spend 15.6.
    """
    packed = packed_case(name, format)
    x = torch.zeros(tokens, packed.shape[1], dtype=torch.bfloat16)
    module = importlib.import_module(f"comptrust.kernels.{name}")
    with compiled.launches(module, capability=capability) as made:
        module.run(x, packed)
    launch = made[0]
    sass = compiled.sass(launch.kernel)
    weights = compiled.weights_per_turn(name, launch.constants)
    if name == "slice_gemv":
        weights /= 1 - SPARSITY
    limit = 7.79 * bits_per_weight(packed) / 8
    return launch, sass, len(sass.loop) * launch.num_warps * 32 / weights, limit


def key(name: str, format: str, tokens: int) -> str:
    return f"{name} {format} M{tokens}"


def main() -> None:
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    print(f"triton {triton.__version__}, sm_90, bfloat16")
    print(
        "| kernel, format, tokens | instructions a weight | budget | limit | registers | spills | tensor-core instructions | main loop |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        _, s, per, limit = measure(*case)
        budget = budgets.get(key(*case), {}).get("instructions", "-")
        mma = sorted({op for op in s.every if op.startswith(("HMMA", "HGMMA"))})
        spills = s.count("LDL") + s.count("STL")
        mix = ", ".join(f"{k} {v}" for k, v in s.mix.items())
        print(
            f"| {key(*case)} | {per:.2f} | {budget} | {limit:.1f} | {s.registers} | {spills} | {', '.join(mma) or '-'} | {mix} |"
        )


if __name__ == "__main__":
    main()
