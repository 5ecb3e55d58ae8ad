"""int3, int4, int8 and 2:4+int4 in plain Triton: dequantise in registers, multiply densely. Fallback of ``int_mma``."""

# pyright: reportOperatorIssue=false, reportAssignmentType=false
# (a checker takes the annotation tl.constexpr for the type of the value)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import element, interpreting, reduce_splits, splits, upcast
from .formats import FORMATS, Packed


@triton.jit
def _fields(ptr, row, first, stride, COUNT: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr):
    """[BN, COUNT] fields of BITS from words; ``first`` is the first field, words behind ``stride`` read as 0."""
    PER: tl.constexpr = 32 // BITS
    w = first // PER + tl.arange(0, COUNT // PER)
    word = tl.load(ptr + row[:, None] * stride + w[None, :], mask=(w < stride)[None, :], other=0)
    shift = tl.arange(0, PER) * BITS
    return tl.reshape((word[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1), (BN, COUNT))


@triton.jit
def int_dot(
    x_ptr, q_ptr, h_ptr, e_ptr, s_ptr, z_ptr, y_ptr, M, N, K, q_words, e_words, group, groups, per,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, SPARSE: tl.constexpr, ZERO: tl.constexpr,
    ONE: tl.constexpr, DT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x [M, K]; q words [N, q_words] (int3: low 2 bits), h high bits of int3, e index words of 2:4; s, z [N, groups]; y [splits, M, N].

    ``group`` is columns a group, ``per`` columns a split, ONE: a step of BK columns lies in one group.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    row = tl.minimum(rows, N - 1).to(tl.int64)
    KEPT: tl.constexpr = BK // 2 if SPARSE else BK  # stored weights of a step
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    first = split * per
    for k0 in range(first, tl.minimum(first + per, K), BK):
        k = k0 + tl.arange(0, BK)
        stored = k0 // 2 if SPARSE else k0
        if BITS == 3:
            code = _fields(q_ptr, row, stored, q_words, KEPT, 2, BN) | (
                _fields(h_ptr, row, stored, q_words // 2, KEPT, 1, BN) << 2
            )
        else:
            code = _fields(q_ptr, row, stored, q_words, KEPT, BITS, BN)
        if ONE and not SPARSE:
            # One scale a row and step: applied to the result, where it costs BM and not BK multiplications a row.
            weight = code.to(tl.float32).to(DT)
        else:
            column = k0 + tl.arange(0, KEPT) * (BK // KEPT)
            at = row[:, None] * groups + tl.minimum(column // group, groups - 1)[None, :]
            zero = tl.load(z_ptr + at).to(tl.float32) if ZERO else 1 << (BITS - 1)
            weight = ((code.to(tl.float32) - zero) * tl.load(s_ptr + at).to(tl.float32)).to(DT)
        if SPARSE:
            nibble = _fields(e_ptr, row, k0 // 4, e_words, BK // 4, 4, BN)
            i0, i1 = nibble & 3, (nibble >> 2) & 3
            lo, hi = tl.split(tl.reshape(weight, (BN, BK // 4, 2)))
            none = tl.zeros_like(lo)
            w0 = tl.where(i0 == 0, lo, none)
            w1 = tl.where(i0 == 1, lo, tl.where(i1 == 1, hi, none))
            w2 = tl.where(i0 == 2, lo, tl.where(i1 == 2, hi, none))
            w3 = tl.where(i1 == 3, hi, none)
            weight = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BN, BK))
        x = tl.load(x_ptr + tokens[None, :] * K + k[:, None], mask=(tokens < M)[None, :] & (k < K)[:, None], other=0.0)
        if UPCAST:
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        if ONE and not SPARSE:
            at = row * groups + k0 // group
            zero = tl.load(z_ptr + at).to(tl.float32)[:, None] if ZERO else 1 << (BITS - 1)
            step = tl.dot(weight, x) - zero * tl.sum(x.to(tl.float32), axis=0)[None, :]
            acc += step * tl.load(s_ptr + at).to(tl.float32)[:, None]
        else:
            acc = tl.dot(weight, x, acc)
    out = y_ptr + (split * M + tokens[None, :]) * N + rows[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(tokens < M)[None, :] & (rows < N)[:, None])


def run(x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    (M, K), N, t = x_TI.shape, packed.shape[0], packed.tensors
    spec = FORMATS[packed.format]
    q = t["low"] if spec.bits == 3 else t["codes"]
    group, BN = packed.group_size or K, 16 if interpreting() else 64
    BK = next((b for b in (128, 64, 32) if group % b == 0), 64)
    BM = min(64, max(16, triton.next_power_of_2(M)))
    S = splits(triton.cdiv(N, BN) * triton.cdiv(M, BM), triton.cdiv(K, BK))
    y = torch.empty((S, M, N), dtype=torch.float32 if S > 1 else x_TI.dtype, device=x_TI.device)
    none = q.new_empty(1)
    int_dot[(triton.cdiv(N, BN), S, triton.cdiv(M, BM))](
        x_TI, q, t.get("high", none), t.get("index", none), t["scale"], t.get("zero", none), y, M, N, K,
        q.shape[1], t["index"].shape[1] if spec.keep else 0, group, t["scale"].shape[1], triton.cdiv(K, S * BK) * BK,
        BM=BM, BN=BN, BK=BK, BITS=spec.bits, SPARSE=bool(spec.keep), ZERO="zero" in t, ONE=group % BK == 0 or group >= K,
        DT=element(x_TI.dtype), UPCAST=upcast(x_TI.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    return reduce_splits(y, x_TI.dtype) if S > 1 else y[0]
