"""Unstructured sparsity times a few tokens, over ``slices``: lane = row, eight nonzeros a chunk, no ranks and no expansion."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import element, high_half, interpreting, low_half, reduce_splits, splits
from .formats import Packed


@triton.jit
def _pairs(value, DT: tl.constexpr):
    """[C, 32] int32 of two 16-bit values -> both as float32."""
    if tl.bfloat16 == DT:  # a bfloat16 is the upper half of a float32
        return (value << 16).to(tl.float32, bitcast=True), (value & -65536).to(tl.float32, bitcast=True)
    else:
        return low_half(value, DT).to(tl.float32), high_half(value, DT).to(tl.float32)


@triton.jit
def _term(acc, x_ptr, value, column, token, K, inside):
    """acc + value * x[token, column]; padding has no column of its own."""
    x = tl.load(x_ptr + token[:, None, None] * K + column[None, :, :], mask=inside[None, :, :], other=0.0)
    return acc + value[None, :, :] * x.to(tl.float32)


@triton.jit
def slice_gemv(
    x_ptr, v_ptr, w_ptr, o_ptr, y_ptr, M, N, K,
    BC: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """x [M, K]; v int32 [chunks, 32, 4] pairs; w int32 [chunks, 32, 2]; o int32 first chunk of every 32 rows; y [SPLIT, M, N]."""
    block, split = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, 32)
    two, four = tl.arange(0, 2), tl.arange(0, 4)
    t = tl.arange(0, MT)
    token = tl.minimum(t, M - 1)
    start, stop = tl.load(o_ptr + block), tl.load(o_ptr + block + 1)
    per = tl.cdiv(tl.cdiv(stop - start, SPLIT), BC) * BC
    acc = tl.zeros((MT, BC, 32), dtype=tl.float32)
    first = start + split * per
    last = tl.minimum(first + per, stop)
    for c0 in range(first, last, BC):
        c = c0 + tl.arange(0, BC)
        inside = (c < last)[:, None] & (lane >= 0)[None, :]
        slot = c[:, None] * 32 + lane[None, :]
        word = tl.load(w_ptr + slot[:, :, None] * 2 + two[None, None, :], mask=inside[:, :, None], other=0)
        pair = tl.load(v_ptr + slot[:, :, None] * 4 + four[None, None, :], mask=inside[:, :, None], other=0)
        w0, w1 = tl.split(word)
        even, odd = tl.split(tl.reshape(pair, (BC, 32, 2, 2)))  # of the last index: pairs 0, 2 and pairs 1, 3
        p0, p2 = tl.split(even)
        p1, p3 = tl.split(odd)
        base = ((w1 >> 18) & 0x3FFF) << 2
        v0, v1 = _pairs(p0, DT)
        v2, v3 = _pairs(p1, DT)
        v4, v5 = _pairs(p2, DT)
        v6, v7 = _pairs(p3, DT)
        acc = _term(acc, x_ptr, v0, base + (w0 & 63), token, K, inside)
        acc = _term(acc, x_ptr, v1, base + ((w0 >> 6) & 63), token, K, inside)
        acc = _term(acc, x_ptr, v2, base + ((w0 >> 12) & 63), token, K, inside)
        acc = _term(acc, x_ptr, v3, base + ((w0 >> 18) & 63), token, K, inside)
        acc = _term(acc, x_ptr, v4, base + ((w0 >> 24) & 63), token, K, inside)
        acc = _term(acc, x_ptr, v5, base + (w1 & 63), token, K, inside)
        acc = _term(acc, x_ptr, v6, base + ((w1 >> 6) & 63), token, K, inside)
        acc = _term(acc, x_ptr, v7, base + ((w1 >> 12) & 63), token, K, inside)
    rows = block * 32 + lane
    out = y_ptr + (split * M + t[:, None]) * N + rows[None, :]
    tl.store(out, tl.sum(acc, axis=1).to(y_ptr.dtype.element_ty), mask=(t < M)[:, None] & (rows < N)[None, :])


def run(x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    (M, K), N = x_TI.shape, packed.shape[0]
    values, words, offsets = (packed.tensors[k] for k in ("values", "words", "offsets"))
    blocks = offsets.shape[0] - 1
    BC = 2 if interpreting() else 8
    S = splits(blocks, max(1, words.shape[0] // max(1, blocks * BC)), per_sm=8)
    y = torch.empty((S, M, N), dtype=torch.float32 if S > 1 else x_TI.dtype, device=x_TI.device)
    slice_gemv[(blocks, S)](
        x_TI, values.view(torch.int32), words, offsets, y, M, N, K,
        BC=BC, MT=triton.next_power_of_2(M), SPLIT=S, DT=element(x_TI.dtype), num_warps=4,
    )  # fmt: skip
    return reduce_splits(y, x_TI.dtype) if S > 1 else y[0]
