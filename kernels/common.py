"""What the Triton kernels share: reading 16-bit pairs, the second pass of a split reduction, how often to split."""

# pyright: reportGeneralTypeIssues=false
# (a checker takes Triton code for plain Python)
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .dispatch import interpreting

SMS = 132  # of an H100 or H200: splits aim at a few programs on each


@triton.jit
def low_half(pair, DT: tl.constexpr):
    """The first of two 16-bit values in an int32, as DT."""
    return pair.to(tl.int16).to(DT, bitcast=True)


@triton.jit
def high_half(pair, DT: tl.constexpr):
    return (pair >> 16).to(tl.int16).to(DT, bitcast=True)


@triton.jit
def pair_as_floats(pair, DT: tl.constexpr):
    """Two 16-bit values in an int32, as two float32."""
    if tl.bfloat16 == DT:  # a bfloat16 is the upper half of a float32
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return low_half(pair, DT).to(tl.float32), high_half(pair, DT).to(tl.float32)


@triton.jit
def add_products(acc0, acc1, acc2, acc3, v, x, MT: tl.constexpr, DT: tl.constexpr):
    """Accumulators of MT tokens plus ``v`` times the activations of one column that ``x`` holds (``by_column``)."""
    if MT == 1:
        acc0 += v * x.to(tl.float32)
    else:
        x0, x1 = pair_as_floats(x.to(tl.int32), DT)
        acc0 += v * x0
        acc1 += v * x1
    if MT == 4:
        x2, x3 = pair_as_floats((x >> 32).to(tl.int32), DT)
        acc2 += v * x2
        acc3 += v * x3
    return acc0, acc1, acc2, acc3


def by_column(x_TI: torch.Tensor) -> torch.Tensor:
    """x [T, I] of up to 4 tokens -> [I], all tokens of a column in one word of 16, 32 or 64 bits: one gather serves them all."""
    T = x_TI.shape[0]
    if T == 1:
        return x_TI.view(-1)
    wide = triton.next_power_of_2(T)
    x_IT = F.pad(x_TI, (0, 0, 0, wide - T)).t().contiguous()
    return x_IT.view({2: torch.int32, 4: torch.int64}[wide]).view(-1)


@triton.jit
def sum_splits(part_ptr, y_ptr, count, S: tl.constexpr, BLOCK: tl.constexpr):
    """y = sum of S partial results in a fixed order: equal inputs give equal bits, which atomics would not."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in tl.static_range(S):
        acc += tl.load(part_ptr + s * count + i, mask=inside, other=0.0)
    tl.store(y_ptr + i, acc.to(y_ptr.dtype.element_ty), mask=inside)


def reduce_splits(part_STO: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 partial results [S, T, O] -> [T, O]."""
    S, T, O = part_STO.shape
    y_TO = torch.empty((T, O), dtype=dtype, device=part_STO.device)
    sum_splits[(triton.cdiv(T * O, 1024),)](part_STO, y_TO, T * O, S=S, BLOCK=1024)
    return y_TO


def splits(programs: int, steps: int, per_sm: int = 4) -> int:
    """Parts to cut the columns into (a power of two up to 16), so that about ``per_sm`` programs share a multiprocessor."""
    s = 1
    while s < 16 and programs * s < SMS * per_sm and steps >= 4 * s:
        s *= 2
    return s


def element(dtype: torch.dtype):
    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter multiplies bfloat16 in ``tl.dot`` as raw bits (triton#11584): there, and only there, it is widened."""
    return interpreting() and dtype == torch.bfloat16
