"""2:4 on sparse tensor cores: Gluon with inline ``mma.sp.m16n8k32``, for decoding (1-64 tokens, more in blocks of 64).

Weights and index words arrive in fragment order (``layouts``), so a lane loads 16 bytes of weights for every 16 x 32 tile and feeds
them to the instruction as they are: 9 bits and under one instruction a weight. A program owns 32 rows; its warps and ``splits``
programs share the columns, and their float32 results are added in a fixed order.
"""

# pyright: reportOperatorIssue=false, reportAssignmentType=false
# (a checker takes the annotation tl.constexpr for the type of the value)
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .formats import Packed
from .fragments import KIND, OPERANDS_SP, Plan, mma_sp, store_tiles


@gluon.jit
def sp24_mma(
    x_ptr, a_ptr, e_ptr, y_ptr, M, N, K2, KT, T8, per,
    W: gl.constexpr, NT: gl.constexpr, PACKED_X: gl.constexpr, ASM0: gl.constexpr, ASM1: gl.constexpr,
):  # fmt: skip
    """a int32 [N/32, KT, 2, 32, 4]; e int32 [N/32, KT, 32]; y [splits, M, N]; ``per`` steps of 32 columns a split.

    x is int32 pairs: [M, K2], or with PACKED_X fragments [KT, T8, 32, 4] of 8 tokens each, zeros behind M.
    W warps, each every W-th step; NT blocks of 8 tokens a program.
    """
    F: gl.constexpr = gl.BlockedLayout([1, 1, NT, 4], [1, 32, 1, 1], [W, 1, 1, 1], [3, 2, 1, 0])  # warp, lane, tokens, register
    A: gl.constexpr = gl.SliceLayout(2, F)
    E: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, F))
    block, split = gl.program_id(0), gl.program_id(1)
    n0 = gl.program_id(2) * NT

    warp_a = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None, None]
    lane_a = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :, None]
    reg_a = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
    warp_e = gl.arange(0, W, layout=gl.SliceLayout(1, E))[:, None]
    lane_e = gl.arange(0, 32, layout=gl.SliceLayout(0, E))[None, :]
    warp, lane, reg = gl.expand_dims(warp_a, 2), gl.expand_dims(lane_a, 2), gl.expand_dims(reg_a, 2)
    n = n0 + gl.arange(0, NT, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, F))))[None, None, :, None]

    # B fragment: register r of lane (g, t) holds the columns 8 r + 2 t and the next of token g.
    token = n * 8 + lane // 4
    if PACKED_X:
        x_at = x_ptr + n * 128 + lane * 4 + reg
    else:
        x_at = x_ptr + token * K2 + lane % 4 + 4 * reg
    a_at = a_ptr + block.to(gl.int64) * KT * 256 + lane_a * 4 + reg_a
    e_at = e_ptr + block.to(gl.int64) * KT * 32 + lane_e
    acc0 = gl.zeros([W, 32, NT, 4], gl.float32, layout=F)
    acc1 = gl.zeros([W, 32, NT, 4], gl.float32, layout=F)
    first = split * per
    last = gl.minimum(first + per, KT)
    for k0 in range(first, last, W):
        k_a, k_e, k = k0 + warp_a, k0 + warp_e, k0 + warp
        a0 = gl.load(a_at + k_a * 256, mask=k_a < last, other=0, eviction_policy="evict_first")
        a1 = gl.load(a_at + k_a * 256 + 128, mask=k_a < last, other=0, eviction_policy="evict_first")
        # Padding names positions 0 and 1 of every group: equal positions are undefined for the instruction.
        e = gl.load(e_at + k_e * 32, mask=k_e < last, other=0x44444444, eviction_policy="evict_first")
        if PACKED_X:
            x = gl.load(x_at + k * (T8 * 128), mask=k < last, other=0)
        else:
            x = gl.load(x_at + k * 16, mask=(k < last) & (token < M), other=0)
        a0, a1, e = gl.expand_dims(a0, 2), gl.expand_dims(a1, 2), gl.expand_dims(gl.expand_dims(e, 2), 3)
        acc0 = gl.inline_asm_elementwise(ASM0, OPERANDS_SP, [a0, x, acc0, e], dtype=gl.float32, is_pure=True, pack=4)
        acc1 = gl.inline_asm_elementwise(ASM1, OPERANDS_SP, [a1, x, acc1, e], dtype=gl.float32, is_pure=True, pack=4)
    store_tiles(y_ptr, acc0, acc1, block, split, n0, M, N, F, NT)


def run(x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    N, kind = packed.shape[0], KIND[x_TI.dtype]
    KT = packed.tensors["index"].numel() // (-(-N // 32) * 32)
    plan = Plan(x_TI, N, KT, 32)
    y = plan.output()
    sp24_mma[plan.grid](
        plan.x, packed.tensors["values"].view(torch.int32), packed.tensors["index"], y, plan.M, N, plan.K2, KT, plan.T8, plan.per,
        W=plan.W, NT=plan.NT, PACKED_X=plan.packed_x, ASM0=mma_sp(kind, 0), ASM1=mma_sp(kind, 1), num_warps=plan.W,
    )  # fmt: skip
    return plan.finish(y)
