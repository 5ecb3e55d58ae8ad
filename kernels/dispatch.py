"""Which kernel runs what: reach (format, layout, tokens, dtype, capability) and the measured table ``dispatch.json``.

``auto`` follows measurements only: a kernel runs where the table, written by ``benchmarks/kernels.py`` on that device, says that it
beats dense for that weight and number of tokens. Everything else is dense.

An entry of the table: ``{"device": "NVIDIA H200", "dtype": "bfloat16", "format": "2:4", "rows": 5120, "columns": 13824,
"tokens": [[8, "sp24_mma"], [64, "sp24_mma"], [2048, "dense"]]}``; a token count takes the first pair that is not below it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib

import torch

from .formats import Packed
from .layouts import cannot

TABLE = pathlib.Path(__file__).with_name("dispatch.json")
HALVES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)  # mma.sp, bfloat16 tensor cores and 16-byte asynchronous copies begin here


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel: module of the same name with ``run(x_TI, packed) -> y_TO``; ``tokens`` is the most it takes."""

    name: str
    formats: tuple[str, ...]
    layout: str
    tokens: int
    interpreted: bool  # plain Triton runs in the interpreter, inline PTX does not
    triton: bool = True


#: In order of preference for ``backend="triton"``, by instructions a weight (docs/kernels.md), as nothing is measured.
KERNELS: dict[str, Kernel] = {
    k.name: k
    for k in (
        Kernel("sp24_mma", ("2:4",), "fragments", 1 << 20, False),
        Kernel("int_mma", ("int3", "int4", "int8", "2:4+int4"), "fragments", 1 << 20, False),
        Kernel("nm_gemv", ("2:4", "4:8", "8:16"), "rows", 4, True),
        Kernel("slice_gemv", ("bitmap",), "slices", 4, True),
        Kernel("sp24_dot", ("2:4",), "rows", 1 << 20, True),
        Kernel("int_dot", ("int3", "int4", "int8", "2:4+int4"), "rows", 1 << 20, True),
        Kernel("cusparselt", ("2:4",), "library", 1 << 20, False, triton=False),
    )
}


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors (``TRITON_INTERPRET=1`` before the first import of one)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unreachable(kernel: Kernel, packed: Packed, tokens: int, device: torch.device) -> str | None:
    """Why ``kernel`` cannot multiply this weight with this many tokens there, or None if it can."""
    if packed.format not in kernel.formats:
        return f"{kernel.name} multiplies {', '.join(kernel.formats)}, not {packed.format}"
    if packed.dtype not in HALVES:
        return f"{kernel.name} needs float16 or bfloat16, got {packed.dtype}"
    if tokens > kernel.tokens:
        return f"{kernel.name} takes up to {kernel.tokens} tokens, got {tokens}"
    if tokens * max(packed.shape) >= 1 << 31:
        return (
            f"{kernel.name} addresses x and y in 32 bits, {tokens} tokens by {max(packed.shape)} are too many: cut x into parts"
        )
    if packed.layout != kernel.layout and (reason := cannot(packed, kernel.layout)) and packed.layout == "rows":
        return f"{kernel.name}: {reason}"
    if kernel.triton and importlib.util.find_spec("triton") is None:
        return f"{kernel.name} needs triton >= 3.6 (pip install 'comptrust[gpu]')"
    if kernel.triton and interpreting():
        return None if kernel.interpreted else f"{kernel.name} is inline PTX and does not run in the interpreter"
    if device.type != "cuda":
        return f"{kernel.name} needs CUDA tensors, x is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"{kernel.name} needs compute capability 8.0 or newer, {torch.cuda.get_device_name(device)} has {capability}"
    return None


def reachable(packed: Packed, tokens: int, device: torch.device) -> list[Kernel]:
    """Triton kernels that can run, best guess first; the library runs by name or by the table."""
    return [k for k in KERNELS.values() if k.triton and unreachable(k, packed, tokens, device) is None]


@functools.cache
def table() -> tuple[dict, ...]:
    return tuple(json.loads(TABLE.read_text())["entries"])


def measured(packed: Packed, tokens: int, device_name: str) -> str:
    """The table's answer: the name of a kernel, or ``dense`` where it says so or says nothing."""
    for entry in table():
        same = (entry["device"], entry["dtype"], entry["format"], entry["rows"], entry["columns"])
        if same == (device_name, str(packed.dtype).removeprefix("torch."), packed.format, *packed.shape):
            return next((kernel for most, kernel in entry["tokens"] if tokens <= most), "dense")
    return "dense"


def choose(packed: Packed, tokens: int, device: torch.device) -> str:
    """What ``auto`` runs: a kernel's name, or ``dense``."""
    if device.type != "cuda":
        return "dense"
    name = measured(packed, tokens, torch.cuda.get_device_name(device))
    return name if name in KERNELS and unreachable(KERNELS[name], packed, tokens, device) is None else "dense"
