"""Unstructured sparsity times a few tokens, over ``slices``: lane = row, eight nonzeros a chunk, no ranks and no expansion."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import add_products, by_column, element, interpreting, pair_as_floats, reduce_splits, splits
from .formats import Packed


@triton.jit
def slice_gemv(
    x_ptr, v_ptr, w_ptr, o_ptr, y_ptr, M, N, K,
    BC: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """x [K], MT tokens in a word; v int32 [chunks, 32, 4] pairs; w int32 [chunks, 32, 2]; o int32 first chunk of every 32 rows;
    y [SPLIT, M, N]."""
    block, split = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, 32)
    two, four = tl.arange(0, 2), tl.arange(0, 4)
    start, stop = tl.load(o_ptr + block), tl.load(o_ptr + block + 1)
    per = tl.cdiv(tl.cdiv(stop - start, SPLIT), BC) * BC
    acc0 = tl.zeros((BC, 32), dtype=tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
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
        base = x_ptr + (((w1 >> 18) & 0x3FFF) << 2)
        v0, v1 = pair_as_floats(p0, DT)
        v2, v3 = pair_as_floats(p1, DT)
        v4, v5 = pair_as_floats(p2, DT)
        v6, v7 = pair_as_floats(p3, DT)
        acc0, acc1, acc2, acc3 = _term(acc0, acc1, acc2, acc3, v0, base + (w0 & 63), inside, MT, DT)
        acc0, acc1, acc2, acc3 = _term(acc0, acc1, acc2, acc3, v1, base + ((w0 >> 6) & 63), inside, MT, DT)
        acc0, acc1, acc2, acc3 = _term(acc0, acc1, acc2, acc3, v2, base + ((w0 >> 12) & 63), inside, MT, DT)
        acc0, acc1, acc2, acc3 = _term(acc0, acc1, acc2, acc3, v3, base + ((w0 >> 18) & 63), inside, MT, DT)
        acc0, acc1, acc2, acc3 = _term(acc0, acc1, acc2, acc3, v4, base + ((w0 >> 24) & 63), inside, MT, DT)
        acc0, acc1, acc2, acc3 = _term(acc0, acc1, acc2, acc3, v5, base + (w1 & 63), inside, MT, DT)
        acc0, acc1, acc2, acc3 = _term(acc0, acc1, acc2, acc3, v6, base + ((w1 >> 6) & 63), inside, MT, DT)
        acc0, acc1, acc2, acc3 = _term(acc0, acc1, acc2, acc3, v7, base + ((w1 >> 12) & 63), inside, MT, DT)
    rows = block * 32 + lane
    out = y_ptr + split * M * N + rows
    _store(out, acc0, rows < N)
    if MT > 1:
        _store(out + N, acc1, rows < N)
    if MT > 2:
        _store(out + 2 * N, acc2, rows < N)
        if M > 3:
            _store(out + 3 * N, acc3, rows < N)


@triton.jit
def _term(acc0, acc1, acc2, acc3, value, x_at, inside, MT: tl.constexpr, DT: tl.constexpr):
    x = tl.load(x_at, mask=inside, other=0)
    return add_products(acc0, acc1, acc2, acc3, value, x, MT, DT)


@triton.jit
def _store(at, acc, mask):
    tl.store(at, tl.sum(acc, axis=0).to(at.dtype.element_ty), mask=mask)


def run(x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    (M, K), N = x_TI.shape, packed.shape[0]
    values, words, offsets = (packed.tensors[k] for k in ("values", "words", "offsets"))
    blocks = offsets.shape[0] - 1
    BC = 2 if interpreting() else 8
    S = splits(blocks, max(1, words.shape[0] // max(1, blocks * BC)), per_sm=8)
    y = torch.empty((S, M, N), dtype=torch.float32 if S > 1 else x_TI.dtype, device=x_TI.device)
    slice_gemv[(blocks, S)](
        by_column(x_TI), values.view(torch.int32), words, offsets, y, M, N, K,
        BC=BC, MT=triton.next_power_of_2(M), SPLIT=S, DT=element(x_TI.dtype), num_warps=4,
    )  # fmt: skip
    return reduce_splits(y, x_TI.dtype) if S > 1 else y[0]
