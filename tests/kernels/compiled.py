"""Compiles kernels for a GPU that is not here, exactly as they would be launched, and reads what became of them.

``launches(module)`` takes the place of the Triton launcher: ``module.run(x, packed)`` on CPU tensors then compiles each kernel with
the very signature, specialisation and options of that call, and records it or runs its PTX (``ptx.py``).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import re
import subprocess
import tempfile

import torch
import triton
from comptrust.kernels import common
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # pinned: Triton 3.10 changes the default
BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
POINTER = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8",
    torch.int64: "*i64",
}  # fmt: skip


@dataclasses.dataclass
class Launch:
    """One launch: the compiled kernel, its constants and grid."""

    name: str
    kernel: object
    constants: dict
    num_warps: int
    grid: tuple


def compile_as_launched(fn, args: tuple, kwargs: dict, capability: int):
    """The compiled kernel of a call, its run-time arguments and constants."""
    options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
    values = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    signature, constants, attrs, runtime = {}, {}, {}, []
    for i, (name, param) in enumerate(zip(fn.arg_names, fn.params, strict=True)):
        value = values[name]
        if param.is_constexpr or (isinstance(value, int) and value == 1):  # Triton specialises on 1
            signature[name], constants[name] = "constexpr", value
            continue
        runtime.append(value)
        signature[name] = POINTER[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:  # GPU allocations are aligned to 256 bytes
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if isinstance(fn, GluonJITFunction) else ASTSource
    kernel = triton.compile(source(fn, signature, constants, attrs), target=GPUTarget("cuda", capability, 32), options=options)
    return kernel, runtime, constants, options.get("num_warps", 4)


@contextlib.contextmanager
def launches(module, *, capability: int = 90, execute: bool = False):
    """Yields the list of launches made by ``module.run`` inside the context; with ``execute`` their PTX runs on the tensors."""
    made: list[Launch] = []

    class Launcher:
        def __init__(self, fn):
            self.fn = fn

        def __getitem__(self, grid):
            return lambda *args, **kwargs: self.launch(tuple(grid) + (1,) * (3 - len(grid)), args, kwargs)

        def launch(self, grid, args, kwargs):
            kernel, runtime, constants, num_warps = compile_as_launched(self.fn, args, kwargs, capability)
            made.append(Launch(self.fn.__name__, kernel, constants, num_warps, grid))
            if execute:
                from ptx import launch

                launch(kernel.asm["ptx"], grid, [array(v) if isinstance(v, torch.Tensor) else v for v in runtime])

    name = module.__name__.rpartition(".")[2]
    patched = [(module, name), (common, "sum_splits")]
    originals = [getattr(m, n) for m, n in patched]
    empty = torch.empty
    try:
        for (m, n), fn in zip(patched, originals, strict=True):
            setattr(m, n, Launcher(fn))
        # Outputs start as NaN: what a kernel forgets to write is seen.
        torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
        yield made
    finally:
        torch.empty = empty
        for (m, n), fn in zip(patched, originals, strict=True):
            setattr(m, n, fn)


def array(t: torch.Tensor):
    """The tensor's memory as numpy; bfloat16 as its bits."""
    assert t.is_contiguous()
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()


@dataclasses.dataclass
class Sass:
    """What the assembler made: ``loop`` is the main loop, as opcodes."""

    loop: list[str]
    every: list[str]
    registers: int
    stack: int

    def count(self, prefix: str) -> int:
        return sum(op.startswith(prefix) for op in self.every)

    @property
    def mix(self) -> dict:
        return dict(collections.Counter(op.split(".")[0] for op in self.loop).most_common(8))


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.M)


def sass(kernel) -> Sass:
    """Disassemble with the tools inside the Triton wheel; the main loop is the longest one between a backward branch and its target."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        dump = lambda flag: (
            subprocess.run([os.path.join(BIN, "cuobjdump"), flag, f.name], capture_output=True, text=True, check=True).stdout
        )
        text, usage = dump("--dump-sass"), dump("--dump-resource-usage")
    code = [(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(text)]
    loops = []
    for address, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target.group(1), 16) < address:
            loops.append([o for a, o, _ in code if int(target.group(1), 16) <= a <= address])
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return Sass(max(loops, key=len) if loops else [], [o for _, o, _ in code], int(used.group(1)), int(used.group(2)))


def weights_per_turn(name: str, c: dict) -> float:
    """Dense weights that one turn of the main loop covers (slice_gemv: nonzeros)."""
    from comptrust.kernels.layouts import STEP

    if name == "sp24_mma":
        return c["W"] * 32 * STEP["2:4"]
    if name == "int_mma":
        return c["W"] * 32 * (STEP["2:4+int4"] if c["SPARSE"] else STEP[f"int{c['BITS']}"])
    if name == "nm_gemv":
        return c["BN"] * c["BW"] * 64 // c["BITS"]
    if name == "slice_gemv":
        return c["BC"] * 32 * 8
    if name == "sp24_dot":
        return c["BN"] * c["BG"] * 4
    return c["BN"] * c["BK"]
