"""N:M times a few tokens, over the nonzeros alone: every kept weight meets the activation its index names.

Nothing is expanded: y_n = sum_j v_j x[position_j]. One kernel serves 2:4 (2-bit positions in groups of 4) and 4:8, 8:16 (4-bit
positions in groups of 16). The activations (10-28 KB a token) stay in L1, where they are gathered from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import interpreting, reduce_splits, splits
from .formats import FORMATS, Packed


@triton.jit
def nm_gemv(
    x_ptr, v_ptr, e_ptr, y_ptr, M, N, K, words, per,
    BN: tl.constexpr, BW: tl.constexpr, MT: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x [M, K]; v [N, words * fields]; e int32 [N, words]; y [splits, M, N]. BN rows, BW index words a step, MT >= M tokens."""
    FIELDS: tl.constexpr = 32 // BITS
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    row = tl.minimum(rows, N - 1).to(tl.int64)
    j = tl.arange(0, FIELDS)
    if BITS == 2:
        base = j // 2 * 4  # two kept weights a group of four
    else:
        base = j * 0
    t = tl.arange(0, MT)
    token = tl.minimum(t, M - 1)
    acc = tl.zeros((MT, BN, BW * FIELDS), dtype=tl.float32)
    first = split * per
    for w0 in range(first, tl.minimum(first + per, words), BW):
        w = w0 + tl.arange(0, BW)
        s = w0 * FIELDS + tl.arange(0, BW * FIELDS)
        if EVEN:
            word = tl.load(e_ptr + row[:, None] * words + w[None, :])
            v = tl.load(v_ptr + row[:, None] * (words * FIELDS) + s[None, :]).to(tl.float32)
        else:
            word = tl.load(e_ptr + row[:, None] * words + w[None, :], mask=(w < words)[None, :], other=0)
            v = tl.load(v_ptr + row[:, None] * (words * FIELDS) + s[None, :], mask=(s < words * FIELDS)[None, :], other=0.0)
            v = v.to(tl.float32)
        index = (word[:, :, None] >> (j * BITS)[None, None, :]) & (2 * FIELDS - 1 if BITS == 4 else 3)
        k = tl.reshape((w * FIELDS * 2)[None, :, None] + base[None, None, :] + index, (BN, BW * FIELDS))
        at = x_ptr + token[:, None, None] * K + k[None, :, :]
        if EVEN:
            x = tl.load(at).to(tl.float32)
        else:
            x = tl.load(at, mask=(k < K)[None, :, :], other=0.0).to(tl.float32)
        acc += v[None, :, :] * x
    out = y_ptr + (split * M + t[:, None]) * N + rows[None, :]
    tl.store(out, tl.sum(acc, axis=2).to(y_ptr.dtype.element_ty), mask=(t < M)[:, None] & (rows < N)[None, :])


def run(x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    (M, K), N = x_TI.shape, packed.shape[0]
    values, index = packed.tensors["values"], packed.tensors["index"]
    words, bits = index.shape[1], 2 if FORMATS[packed.format].of == 4 else 4
    BN, BW = (4, 4) if interpreting() else (8, 16 * bits // 2)
    S = splits(triton.cdiv(N, BN), triton.cdiv(words, BW), per_sm=8)
    per = triton.cdiv(words, S * BW) * BW
    y = torch.empty((S, M, N), dtype=torch.float32 if S > 1 else x_TI.dtype, device=x_TI.device)
    nm_gemv[(triton.cdiv(N, BN), S)](
        x_TI, values, index, y, M, N, K, words, per,
        BN=BN, BW=BW, MT=triton.next_power_of_2(M), BITS=bits, EVEN=K % (BW * 64 // bits) == 0, num_warps=4,
    )  # fmt: skip
    return reduce_splits(y, x_TI.dtype) if S > 1 else y[0]
