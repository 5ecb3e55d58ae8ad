"""What the tensor-core kernels over fragment-ordered weights share: PTX, the plan of a launch, storing the C fragment."""

# pyright: reportAssignmentType=false
# (a checker takes Triton code for plain Python)
from __future__ import annotations

import torch
import torch.nn.functional as F
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .common import SMS, reduce_splits
from .layouts import ROWS

KIND = {torch.float16: "f16", torch.bfloat16: "bf16"}
#: Outputs and operands of one instruction on four registers each: result, A, B, C (and index words).
OPERANDS_SP = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r")


def mma_sp(kind: str, selector: int) -> str:
    """PTX of one sparse step: selector 0 reads index words of lanes 0 and 1 of every quad (tile 0), selector 1 those of 2 and 3."""
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, $16, 0x{selector};"
    )


@gluon.jit
def store_tiles(y_ptr, acc0, acc1, block, split, n0, M, N, F: gl.constexpr, NT: gl.constexpr):
    """Add the warps' results in a fixed order and store two 16-row tiles of y [splits, M, N].

    C fragment: registers 0, 1 are row lane / 4, registers 2, 3 that row + 8; columns (tokens) 2 (lane % 4) + register % 2.
    """
    Y: gl.constexpr = gl.SliceLayout(0, F)
    lane = gl.arange(0, 32, layout=gl.SliceLayout(1, gl.SliceLayout(2, Y)))[:, None, None]
    n = n0 + gl.arange(0, NT, layout=gl.SliceLayout(0, gl.SliceLayout(2, Y)))[None, :, None]
    reg = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, Y)))[None, None, :]
    row = block * 32 + lane // 4 + 8 * (reg // 2)
    token = n * 8 + (lane % 4) * 2 + reg % 2
    out = y_ptr + (split * M + token).to(gl.int64) * N + row
    gl.store(out, gl.sum(acc0, axis=0).to(y_ptr.dtype.element_ty), mask=(token < M) & (row < N))
    gl.store(out + 16, gl.sum(acc1, axis=0).to(y_ptr.dtype.element_ty), mask=(token < M) & (row + 16 < N))


class Plan:
    """How one product is cut: warps and splits over ``steps`` of ``width`` columns, blocks of 8 tokens, the form of x.

    Up to 8 tokens x is read as it is. Beyond, it is brought into fragment order once (one copy kernel): otherwise every program
    would read 4-byte pieces of it from a different cache line a token, more often than DRAM delivers weights.
    """

    def __init__(self, x_TI: torch.Tensor, rows: int, steps: int, width: int, *, pack_x: bool = True, most: int = 8) -> None:
        self.M, self.dtype, self.rows = x_TI.shape[0], x_TI.dtype, rows
        columns = steps * width
        if x_TI.shape[1] != columns:  # the tail of a last step; never for widths of real models
            x_TI = F.pad(x_TI, (0, columns - x_TI.shape[1]))
        blocks = -(-self.M // 8)
        self.NT = min(most, 1 << (blocks - 1).bit_length())
        groups = -(-blocks // self.NT)
        self.T8 = groups * self.NT
        self.packed_x = pack_x and self.M > 8
        self.K2 = columns // 2
        self.x = fragments_of(x_TI, self.T8) if self.packed_x else x_TI.view(torch.int32)
        programs = -(-rows // ROWS) * groups
        self.W = 8 if self.NT <= 2 else 4
        # One step a warp is in flight (the assembler moves no second load above a tensor-core instruction): 32 warps of 1.1 KB on
        # each multiprocessor cover latency x bandwidth (about 25 KB). A split costs M x rows floats, written and read again.
        self.S = 1
        while self.S < 8 and programs * self.S * self.W < SMS * 32 and steps >= 2 * self.S * self.W:
            self.S *= 2
        self.per = -(-steps // self.S)
        self.grid = (-(-rows // ROWS), self.S, groups)
        self.device = x_TI.device

    def output(self) -> torch.Tensor:
        dtype = torch.float32 if self.S > 1 else self.dtype
        return torch.empty((self.S, self.M, self.rows), dtype=dtype, device=self.device)

    def finish(self, y: torch.Tensor) -> torch.Tensor:
        return reduce_splits(y, self.dtype) if self.S > 1 else y[0]


def fragments_of(x_TI: torch.Tensor, blocks: int) -> torch.Tensor:
    """x [T, 32 k] -> int32 [k, blocks, 32 lanes, 4]: register r of lane (g, t) is columns 8 r + 2 t and the next of token g."""
    x_TI = F.pad(x_TI, (0, 0, 0, blocks * 8 - x_TI.shape[0]))
    pairs = x_TI.view(torch.int32).view(blocks, 8, -1, 4, 4)  # block, g, k, r, t
    return pairs.permute(2, 0, 1, 4, 3).contiguous()
