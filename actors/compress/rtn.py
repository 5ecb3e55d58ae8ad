"""RTN: round every weight to the nearest point of its group's grid. The baseline every other quantiser must beat."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from . import grid
from .base import Bits, GroupSize, Inputs, MethodConfig, Solution


class RtnConfig(MethodConfig):
    bits: Bits = Field(default=4, description="bits per code")
    group_size: GroupSize = 128
    symmetric: bool = Field(
        default=True, description="no zero points; asymmetric costs `bits` more per group and fits skewed groups"
    )


def round_to_nearest(W_OI: Tensor, bits: int, group_size: int | None, symmetric: bool) -> Solution:
    """``W_OI`` float32 on the nearest points of a min-max grid per ``group_size`` inputs (None: per output channel)."""
    O, I = W_OI.shape
    W = W_OI.reshape(-1, group_size or I)
    scale, zero = grid.fit(W, bits, symmetric)
    codes = grid.quantise(W, scale, zero, bits)
    weight = grid.dequantise(codes, scale, zero).view(O, I)
    codes, scale, zero = grid.store(codes, scale, zero)
    return Solution(weight, codes.view(O, I), scale.view(O, -1), None if zero is None else zero.view(O, -1))


def solve(W_OI: Tensor, inputs: Inputs, config: RtnConfig) -> Solution:
    return round_to_nearest(W_OI, config.bits, config.group_size, config.symmetric)
