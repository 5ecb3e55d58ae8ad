"""2:4 in plain Triton: the kept pair of every group is expanded in registers and multiplied densely.

The bytes of 2:4 (9 bits a weight), the arithmetic of dense: a fallback for where the sparse tensor-core kernel cannot run, and the
form that the interpreter can check. Two instructions (PRMT) expand a group of four; budgets in ``budgets.json``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import element, high_half, interpreting, low_half, reduce_splits, splits, upcast
from .formats import Packed


@triton.jit
def sp24_dot(
    x_ptr, v_ptr, e_ptr, y_ptr, M, N, K, words, per,
    BM: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, DT: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x [M, K]; v int32 [N, 8 words] pairs of kept values; e int32 [N, words], eight groups each; y [splits, M, N].

    BM tokens x BN rows; BG groups of four a step; ``per`` groups a split; EVEN: every step lies inside K.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    row = tl.minimum(rows, N - 1).to(tl.int64)  # surplus rows repeat the last one and are not stored
    shift = tl.arange(0, 8) * 4
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    first = split * per
    for g0 in range(first, tl.minimum(first + per, words * 8), BG):
        g = g0 + tl.arange(0, BG)
        w = g0 // 8 + tl.arange(0, BG // 8)
        k = g0 * 4 + tl.arange(0, BG * 4)
        if EVEN:
            pair = tl.load(v_ptr + row[:, None] * (words * 8) + g[None, :])
            word = tl.load(e_ptr + row[:, None] * words + w[None, :])
            x = tl.load(x_ptr + tokens[None, :] * K + k[:, None], mask=(tokens < M)[None, :], other=0.0)
        else:
            pair = tl.load(v_ptr + row[:, None] * (words * 8) + g[None, :], mask=(g < words * 8)[None, :], other=0)
            word = tl.load(e_ptr + row[:, None] * words + w[None, :], mask=(w < words)[None, :], other=0)
            x = tl.load(x_ptr + tokens[None, :] * K + k[:, None], mask=(tokens < M)[None, :] & (k < K)[:, None], other=0.0)
        nibble = tl.reshape(word[:, :, None] >> shift[None, None, :], (BN, BG))
        if ASM:
            # Selector of four byte pairs: 0x44 reads the zero operand, 0x10 the first kept value, 0x32 the second.
            d01, d23 = tl.inline_asm_elementwise(
                """{
                .reg .b32 s, t;
                and.b32 s, $3, 3; shl.b32 s, s, 3;
                shl.b32 t, $3, 1; and.b32 t, t, 24;
                shl.b32 s, 0x54, s; shl.b32 t, 0x76, t;
                xor.b32 s, s, t; xor.b32 s, s, 0x44444444;
                prmt.b32 $0, $2, 0, s; shr.u32 s, s, 16; prmt.b32 $1, $2, 0, s;
                }""",
                "=&r,=&r,r,r", [pair, nibble], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
            w0, w1 = low_half(d01, DT), high_half(d01, DT)
            w2, w3 = low_half(d23, DT), high_half(d23, DT)
        else:
            i0, i1 = nibble & 3, (nibble >> 2) & 3
            lo, hi = low_half(pair, DT), high_half(pair, DT)
            zero = tl.zeros_like(lo)
            w0 = tl.where(i0 == 0, lo, zero)
            w1 = tl.where(i0 == 1, lo, tl.where(i1 == 1, hi, zero))
            w2 = tl.where(i0 == 2, lo, tl.where(i1 == 2, hi, zero))
            w3 = tl.where(i1 == 3, hi, zero)
        dense = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BN, BG * 4))
        if UPCAST:
            acc = tl.dot(dense.to(tl.float32), x.to(tl.float32), acc)
        else:
            acc = tl.dot(dense, x, acc)
    out = y_ptr + (split * M + tokens[None, :]) * N + rows[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(tokens < M)[None, :] & (rows < N)[:, None])


def run(x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    (M, K), N = x_TI.shape, packed.shape[0]
    values, index = packed.tensors["values"], packed.tensors["index"]
    words = index.shape[1]
    BN, BG = (16, 16) if interpreting() else (64, 64)
    BM = min(64, max(16, triton.next_power_of_2(M)))
    S = splits(triton.cdiv(N, BN) * triton.cdiv(M, BM), triton.cdiv(words * 8, BG))
    per = triton.cdiv(words * 8, S * BG) * BG
    y = torch.empty((S, M, N), dtype=torch.float32 if S > 1 else x_TI.dtype, device=x_TI.device)
    sp24_dot[(triton.cdiv(N, BN), S, triton.cdiv(M, BM))](
        x_TI, values.view(torch.int32), index, y, M, N, K, words, per,
        BM=BM, BN=BN, BG=BG, DT=element(x_TI.dtype), EVEN=K % (BG * 4) == 0, ASM=not interpreting(), UPCAST=upcast(x_TI.dtype),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return reduce_splits(y, x_TI.dtype) if S > 1 else y[0]
