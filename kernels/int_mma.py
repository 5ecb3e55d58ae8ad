"""int3, int4, int8 and 2:4+int4 on tensor cores: codes in fragment order, dequantised in registers by bit tricks.

A code goes into the mantissa of a 16-bit float by one LOP3 (0x4300 | q is 128 + q in bfloat16, 0x6400 | q is 1024 + q in float16),
two at a time; adding -(128 + zero) leaves the whole number q - zero exactly, as zero points end at 2^bits. The tensor core multiplies
those, and the scale meets the float32 result, once a step of 32 to 128 columns: no product is ever rounded to 16 bits.
"""

# pyright: reportOperatorIssue=false, reportAssignmentType=false
# (a checker takes the annotation tl.constexpr for the type of the value)
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .formats import FORMATS, Packed
from .fragments import KIND, Plan, store_tiles
from .layouts import STEP

#: By kind: bits of the mantissa, and 1.0.
FLOAT = {"bf16": (7, 0x3F80), "f16": (10, 0x3C00)}


def magic(kind: str, at: int) -> int:
    """The 16-bit float whose mantissa counts in ones from bit ``at``: 2^(mantissa - at); a code ORed in there adds itself."""
    mantissa, one = FLOAT[kind]
    return one + ((mantissa - at) << mantissa)


def dequantise(bits: int, kind: str, tile: int) -> str:
    """PTX from words to A fragments: register 2 c + h of every 16-column step, row half h of ``tile``; zero points in the last four.

    int4: words 4 -> 16 registers. int8: words 4 -> 8. int3: words 3 (each given four times) -> 16.
    """
    registers, words = {3: (16, 12), 4: (16, 4), 8: (8, 4)}[bits]
    mantissa, one = FLOAT[kind]
    word = lambda i: f"${registers + i}"
    zero = lambda r: f"${registers + words + 2 * tile + r % 2}"
    pair = lambda value: f"{value * 0x10001:#x}"
    code = lambda source, at: f"lop3.b32 t, {source}, {pair(((1 << bits) - 1) << at)}, {pair(magic(kind, at))}, 0xEA;"
    minus = lambda i, z: f"fma.rn.{kind}x2 ${i}, t, one, {z};"
    lines = ["{", ".reg .b32 t, u, one, up<2>;", ".reg .f32 f, g, z;", f"mov.b32 one, {pair(one)};"]
    if bits == 8:
        for i in range(registers):
            # 0x4B000000 | q is 2^23 + q in float32; the zero point comes as 2^23 + zero.
            step, r = divmod(i, 4)
            source, byte = word(2 * step + r // 2), 2 * (r % 2)
            lines += [f"mov.b32 z, {zero(r)};"]
            for name, b in (("f", byte), ("g", byte + 1)):
                lines += [
                    f"prmt.b32 t, {source}, 0x4B000000, {0x7440 | b:#x};",
                    f"mov.b32 {name}, t;",
                    f"sub.f32 {name}, {name}, z;",
                ]
            lines.append(f"cvt.rn.{kind}x2.f32 ${i}, g, f;")
    elif bits == 4:
        for i in range(registers):
            lines += [f"shr.u32 t, {word(i // 4)}, {4 * (i % 4)};", code("t", 0), minus(i, zero(i))]
    else:
        # Codes at bits 0 and 3 of a half fit any mantissa, so two shifts a word serve its five pairs. One that starts at bit 3
        # counts from 2^(mantissa - 3): its zero point is nearer by 7/8 of 2^mantissa, which is 1.75 * 2^(mantissa - 1).
        nearer = one + ((mantissa - 1) << mantissa) + (3 << (mantissa - 2))
        lines += [f"mov.b32 u, {pair(nearer)};", *(f"fma.rn.{kind}x2 up{h}, {zero(h)}, one, u;" for h in range(2))]
        for w in range(3):
            for f in range(0, 5, 2):
                lines.append(f"shr.u32 u, {word(4 * w)}, {3 * f};")
                lines += [code("u", 0), minus(5 * w + f, zero(5 * w + f))]
                if f < 4:
                    lines += [code("u", 3), minus(5 * w + f + 1, f"up{(5 * w + f + 1) % 2}")]
        # The sixteenth: a bit from the top of every half word, brought side by side to bits 3 to 5.
        lines += [f"shr.u32 t, {word(0)}, 12;"]
        lines += [f"shr.u32 u, {word(4)}, 11;", f"lop3.b32 t, t, u, {pair(0x08)}, 0xE4;"]
        lines += [f"shr.u32 u, {word(8)}, 10;", f"lop3.b32 t, t, u, {pair(0x18)}, 0xE4;", code("t", 3), minus(15, "up1")]
    return "\n".join([*lines, "}"])


def constraints(outputs: str, inputs: str) -> str:
    """``ff`` and ``rrf`` -> LLVM constraints for four registers each; outputs are written before the last input is read (``&``)."""
    return ",".join([f"=&{c}" for c in outputs for _ in range(4)] + [c for c in inputs for _ in range(4)])


def multiply(kind: str, steps: int, sparse: bool, tile: int) -> str:
    """PTX of one step: ``steps`` tensor-core instructions from zero, then result * scale + accumulator.

    Operands, four registers each: A fragments; activations (dense: one for two fragments); index words if sparse; scales; accumulator.
    """
    a, x = 4, 4 + 4 * steps
    e = x + (4 * steps if sparse else 2 * steps)
    s = e + (4 if sparse else 0)
    lines = ["{", ".reg .f32 d<4>;", *(f"mov.f32 d{r}, 0f00000000;" for r in range(4))]
    for i in range(steps):
        A = ",".join(f"${a + 4 * i + r}" for r in range(4))
        if sparse:
            B = ",".join(f"${x + 4 * i + r}" for r in range(4))
            head, tail = "mma.sp::ordered_metadata.sync.aligned.m16n8k32", f", ${e + i}, 0x{tile}"
        else:
            B = ",".join(f"${x + 2 * i + r}" for r in range(2))
            head, tail = "mma.sync.aligned.m16n8k16", ""
        lines.append(f"{head}.row.col.f32.{kind}.{kind}.f32 {{d0,d1,d2,d3}}, {{{A}}}, {{{B}}}, {{d0,d1,d2,d3}}{tail};")
    lines += [f"fma.rn.f32 ${r}, d{r}, ${s + 2 * tile + r // 2}, ${s + 4 + r};" for r in range(4)]
    return "\n".join([*lines, "}"])


@gluon.jit
def int_mma(
    x_ptr, q_ptr, e_ptr, s_ptr, z_ptr, y_ptr, M, N, K2, KT, T8, per,
    W: gl.constexpr, GROUP: gl.constexpr, NT: gl.constexpr, BITS: gl.constexpr, SPARSE: gl.constexpr, ZERO: gl.constexpr,
    CODE0: gl.constexpr,
    PACKED_X: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, DC: gl.constexpr, M0: gl.constexpr, M1: gl.constexpr,
    MC: gl.constexpr,
):  # fmt: skip
    """q int32 [N/32, KT, 2, 32, 4] code words (int3: int64 [N/32, KT, 3, 32]); e int32 [N/32, KT, 32, 4]; s, z [groups, N].

    x int32 pairs [M, K2], or with PACKED_X fragments [4 KT, T8, 32, 4]; y [splits, M, N]; ``per`` steps a split, GROUP steps a scale.
    W warps, each every W-th step; NT blocks of 8 tokens. D0, D1 dequantise and M0, M1 multiply tile 0 and 1.
    """
    F: gl.constexpr = gl.BlockedLayout([1, 1, NT, 4], [1, 32, 1, 1], [W, 1, 1, 1], [3, 2, 1, 0])  # warp, lane, tokens, register
    A: gl.constexpr = gl.SliceLayout(2, F)
    E: gl.constexpr = gl.SliceLayout(2, A)
    STEPS: gl.constexpr = 2 if BITS == 8 else 4  # tensor-core instructions a tile and step
    block, split = gl.program_id(0), gl.program_id(1)
    n0 = gl.program_id(2) * NT
    rows = (gl.num_programs(0) * 32).to(gl.uint32)

    warp_a = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None, None]
    lane_a = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, A)))[None, :, None]
    reg_a = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
    warp_e = gl.arange(0, W, layout=gl.SliceLayout(1, E))[:, None]
    lane_e = gl.arange(0, 32, layout=gl.SliceLayout(0, E))[None, :]
    warp, lane, reg = gl.expand_dims(warp_a, 2), gl.expand_dims(lane_a, 2), gl.expand_dims(reg_a, 2)
    n = n0 + gl.arange(0, NT, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, F))))[None, None, :, None]
    token = n * 8 + lane // 4
    if PACKED_X:
        x_at = x_ptr + n * 128 + lane * 4 + reg
    elif SPARSE:
        x_at = x_ptr + token * K2 + lane % 4 + 4 * reg
    else:
        x_at = x_ptr + token * K2 + lane % 4 * 4 + reg  # columns 8 t to 8 t + 7 of every 32: one 16-byte load

    tile0 = block.to(gl.int64) * KT
    row_a = (block * 32 + lane_a // 4 * 4 + reg_a).to(gl.uint32)
    if BITS == 3:
        q_at = q_ptr + tile0 * 96 + lane_e  # 64 bits: the same word of both tiles
    else:
        q_at = q_ptr + tile0 * 256 + lane_a * 4 + reg_a
    e_at = e_ptr + tile0 * 128 + lane_a * 4 + reg_a
    acc0 = gl.zeros([W, 32, NT, 4], gl.float32, layout=F)
    acc1 = gl.zeros([W, 32, NT, 4], gl.float32, layout=F)
    first = split * per
    last = gl.minimum(first + per, KT)
    for k0 in range(first, last, W):
        k_a, k_e, k = k0 + warp_a, k0 + warp_e, k0 + warp
        in_a, in_e = k_a < last, k_e < last
        if PACKED_X:
            in_x = k < last
        else:
            in_x = (k < last) & (token < M)
        at = (k_a.to(gl.uint32) // GROUP) * rows + row_a  # the four rows of a lane are stored side by side
        scale = gl.expand_dims(gl.load(s_ptr + at, mask=in_a, other=0.0).to(gl.float32), 2)
        if ZERO:
            zero = gl.load(z_ptr + at, mask=in_a, other=0).to(gl.int32)
        else:
            zero = gl.full([W, 32, 4], 1 << (BITS - 1), gl.int32, layout=A)
        if BITS == 8:
            zero += 0x4B000000
        else:
            zero = (zero + CODE0) * 0x10001
        if BITS == 3:
            pair = q_at + k_e * 96
            w0 = gl.expand_dims(gl.load(pair, mask=in_e, other=0, eviction_policy="evict_first"), 2)
            w1 = gl.expand_dims(gl.load(pair + 32, mask=in_e, other=0, eviction_policy="evict_first"), 2)
            w2 = gl.expand_dims(gl.load(pair + 64, mask=in_e, other=0, eviction_policy="evict_first"), 2)
            l0, l1, l2 = w0.to(gl.int32), w1.to(gl.int32), w2.to(gl.int32)
            h0, h1, h2 = (w0 >> 32).to(gl.int32), (w1 >> 32).to(gl.int32), (w2 >> 32).to(gl.int32)
            a0, a1, a2, a3 = gl.inline_asm_elementwise(
                D0, DC, [l0, l1, l2, zero], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=4
            )
            b0, b1, b2, b3 = gl.inline_asm_elementwise(
                D1, DC, [h0, h1, h2, zero], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=4
            )
        else:
            q0 = gl.load(q_at + k_a * 256, mask=in_a, other=0, eviction_policy="evict_first")
            q1 = gl.load(q_at + k_a * 256 + 128, mask=in_a, other=0, eviction_policy="evict_first")
            if BITS == 4:
                a0, a1, a2, a3 = gl.inline_asm_elementwise(
                    D0, DC, [q0, zero], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=4
                )
                b0, b1, b2, b3 = gl.inline_asm_elementwise(
                    D1, DC, [q1, zero], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=4
                )
            else:
                a0, a1 = gl.inline_asm_elementwise(D0, DC, [q0, zero], dtype=(gl.int32, gl.int32), is_pure=True, pack=4)
                b0, b1 = gl.inline_asm_elementwise(D1, DC, [q1, zero], dtype=(gl.int32, gl.int32), is_pure=True, pack=4)
        a0, a1 = gl.expand_dims(a0, 2), gl.expand_dims(a1, 2)
        b0, b1 = gl.expand_dims(b0, 2), gl.expand_dims(b1, 2)
        if STEPS == 2:
            x0 = gl.load(x_at + k * 16, mask=in_x, other=0)
            acc0 = gl.inline_asm_elementwise(M0, MC, [a0, a1, x0, scale, acc0], dtype=gl.float32, is_pure=True, pack=4)
            acc1 = gl.inline_asm_elementwise(M1, MC, [b0, b1, x0, scale, acc1], dtype=gl.float32, is_pure=True, pack=4)
        else:
            a2, a3 = gl.expand_dims(a2, 2), gl.expand_dims(a3, 2)
            b2, b3 = gl.expand_dims(b2, 2), gl.expand_dims(b3, 2)
            if SPARSE:
                x_step = 16
                if PACKED_X:
                    x_step = T8 * 128
                # Padding names positions 0 and 1 of every group: equal positions are undefined for the instruction.
                e = gl.expand_dims(gl.load(e_at + k_a * 128, mask=in_a, other=0x44444444, eviction_policy="evict_first"), 2)
                x0 = gl.load(x_at + (4 * k) * x_step, mask=in_x, other=0)
                x1 = gl.load(x_at + (4 * k + 1) * x_step, mask=in_x, other=0)
                x2 = gl.load(x_at + (4 * k + 2) * x_step, mask=in_x, other=0)
                x3 = gl.load(x_at + (4 * k + 3) * x_step, mask=in_x, other=0)
                acc0 = gl.inline_asm_elementwise(
                    M0, MC, [a0, a1, a2, a3, x0, x1, x2, x3, e, scale, acc0], dtype=gl.float32, is_pure=True, pack=4
                )
                acc1 = gl.inline_asm_elementwise(
                    M1, MC, [b0, b1, b2, b3, x0, x1, x2, x3, e, scale, acc1], dtype=gl.float32, is_pure=True, pack=4
                )
            else:
                x0 = gl.load(x_at + k * 32, mask=in_x, other=0)
                x1 = gl.load(x_at + k * 32 + 16, mask=in_x, other=0)
                acc0 = gl.inline_asm_elementwise(
                    M0, MC, [a0, a1, a2, a3, x0, x1, scale, acc0], dtype=gl.float32, is_pure=True, pack=4
                )
                acc1 = gl.inline_asm_elementwise(
                    M1, MC, [b0, b1, b2, b3, x0, x1, scale, acc1], dtype=gl.float32, is_pure=True, pack=4
                )
    store_tiles(y_ptr, acc0, acc1, block, split, n0, M, N, F, NT)


def constants(format: str, dtype: torch.dtype) -> dict:
    """The constexprs that follow from format and dtype."""
    spec, kind = FORMATS[format], KIND[dtype]
    steps, sparse = 2 if spec.bits == 8 else 4, bool(spec.keep)
    words = 3 if spec.bits == 3 else 1
    activations = steps + 1 if sparse else steps // 2
    return {
        "BITS": spec.bits, "SPARSE": sparse, "CODE0": 0x8000 | magic(kind, 0),
        "D0": dequantise(spec.bits, kind, 0), "D1": dequantise(spec.bits, kind, 1),
        "DC": constraints("r" * steps, "r" * (words + 1)),
        "M0": multiply(kind, steps, sparse, 0), "M1": multiply(kind, steps, sparse, 1),
        "MC": constraints("f", "r" * (steps + activations) + "ff"),
    }  # fmt: skip


def run(x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    t, (N, I), step = packed.tensors, packed.shape, STEP[packed.format]
    KT = -(-I // step)
    plan = Plan(x_TI, N, KT, step, pack_x=packed.format == "2:4+int4", most=4)
    y = plan.output()
    q = t["codes"].view(torch.int64) if packed.format == "int3" else t["codes"]
    group = KT if (packed.group_size or I) >= I else packed.group_size // step
    int_mma[plan.grid](
        plan.x, q, t.get("index", q), t["scale"], t.get("zero", q), y,
        plan.M, N, plan.K2, KT, plan.T8, plan.per,
        W=plan.W, GROUP=group, NT=plan.NT, ZERO="zero" in t, PACKED_X=plan.packed_x,
        num_warps=plan.W, **constants(packed.format, x_TI.dtype),
    )  # fmt: skip
    return plan.finish(y)
