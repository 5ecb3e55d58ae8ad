"""N:M times a few tokens, over the nonzeros alone: every kept weight meets the activation its index names.

Nothing is expanded: y_n = sum_j v_j x[position_j]. One kernel serves 2:4 (2-bit positions in groups of 4) and 4:8, 8:16 (4-bit
positions in groups of 16). The activations (10-28 KB a token) stay in L1, where they are gathered from: for two to four tokens they
are interleaved first, so that one load brings all tokens of a column.
"""

# pyright: reportOperatorIssue=false, reportAssignmentType=false
# (a checker takes the annotation tl.constexpr for the type of the value)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import add_products, by_column, element, interpreting, reduce_splits, splits
from .formats import FORMATS, Packed


@triton.jit
def nm_gemv(
    x_ptr, v_ptr, e_ptr, y_ptr, M, N, K, words, per,
    BN: tl.constexpr, BW: tl.constexpr, MT: tl.constexpr, BITS: tl.constexpr, DT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x [K], MT tokens in a word; v [N, words * fields]; e int32 [N, words]; y [splits, M, N]. BN rows, BW index words a step."""
    FIELDS: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    row = tl.minimum(rows, N - 1).to(tl.int64)
    j = tl.arange(0, FIELDS)
    if BITS == 2:
        base = j // 2 * 4  # two kept weights a group of four
    else:
        base = j * 0
    # One accumulator a token, of the shape of the weights: a token dimension makes the compiler move weights through shared memory.
    acc0 = tl.zeros((BN, BW, FIELDS), dtype=tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    first = split * per
    for w0 in range(first, tl.minimum(first + per, words), BW):
        w = w0 + tl.arange(0, BW)
        v_at = v_ptr + row[:, None, None] * (words * FIELDS) + w[None, :, None] * FIELDS + j[None, None, :]
        if EVEN:
            word = tl.load(e_ptr + row[:, None] * words + w[None, :])
            v = tl.load(v_at).to(tl.float32)
        else:
            word = tl.load(e_ptr + row[:, None] * words + w[None, :], mask=(w < words)[None, :], other=0)
            v = tl.load(v_at, mask=(w < words)[None, :, None], other=0.0).to(tl.float32)
        k = w[None, :, None] * (FIELDS * 2) + base[None, None, :] + ((word[:, :, None] >> (j * BITS)[None, None, :]) & MASK)
        if EVEN:
            x = tl.load(x_ptr + k)
        else:
            x = tl.load(x_ptr + k, mask=k < K, other=0)
        acc0, acc1, acc2, acc3 = add_products(acc0, acc1, acc2, acc3, v, x, MT, DT)
    out = y_ptr + split * M * N + rows
    inside = rows < N
    _store(out, acc0, inside, BN, BW * FIELDS)
    if MT > 1:
        _store(out + N, acc1, inside, BN, BW * FIELDS)
    if MT > 2:
        _store(out + 2 * N, acc2, inside, BN, BW * FIELDS)
        if M > 3:
            _store(out + 3 * N, acc3, inside, BN, BW * FIELDS)


@triton.jit
def _store(at, acc, mask, BN: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(at, tl.sum(tl.reshape(acc, (BN, COLUMNS)), axis=1).to(at.dtype.element_ty), mask=mask)


def run(x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    (M, K), N = x_TI.shape, packed.shape[0]
    values, index = packed.tensors["values"], packed.tensors["index"]
    words, bits = index.shape[1], 2 if FORMATS[packed.format].of == 4 else 4
    BN, BW = (4, 4) if interpreting() else (8, 16 * bits // 2)
    S = splits(triton.cdiv(N, BN), triton.cdiv(words, BW), per_sm=8)
    per = triton.cdiv(words, S * BW) * BW
    y = torch.empty((S, M, N), dtype=torch.float32 if S > 1 else x_TI.dtype, device=x_TI.device)
    nm_gemv[(triton.cdiv(N, BN), S)](
        by_column(x_TI), values, index, y, M, N, K, words, per,
        BN=BN, BW=BW, MT=triton.next_power_of_2(M), BITS=bits, DT=element(x_TI.dtype), EVEN=K % (BW * 64 // bits) == 0, num_warps=4,
    )  # fmt: skip
    return reduce_splits(y, x_TI.dtype) if S > 1 else y[0]
