"""The integer grids: scale and zero point of a group of weights, rounding to codes and back.

Scales are rounded to float16 before codes are chosen, because that is how they are stored: the error is then part of what the
method sees and nothing is hidden from the bytes counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TINY = 2.0**-24  # the smallest float16 above zero


def half_exact(scale: Tensor) -> Tensor:
    """``scale`` rounded to the nearest float16, never zero, as float32."""
    return scale.clamp(TINY, 65504.0).half().float()


def half_below(scale: Tensor) -> Tensor:
    """The largest float16 that is not above ``scale``, never zero, as float32."""
    scale = scale.clamp(TINY, 65504.0)
    half = scale.half()
    return (half.view(torch.int16) - (half.float() > scale).to(torch.int16)).view(torch.float16).float()


def span(W: Tensor, symmetric: bool, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Ends of the range a grid has to cover, along ``dim`` (kept, length 1). An asymmetric one always holds 0."""
    if symmetric:
        high = W.abs().amax(dim, keepdim=True)
        return -high, high
    return W.amin(dim, keepdim=True).clamp_(max=0), W.amax(dim, keepdim=True).clamp_(min=0)


def over(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """The grid of a `span`: (scale float32, zero point float32 or None).

    Symmetric: scale = 2 max|w| / (2^b - 1), codes -2^(b-1) .. 2^(b-1) - 1. The largest weights lie half-way between two codes, and the
    scale is rounded down so that -max always takes the lowest one, as in exact arithmetic: where it takes the one above, the largest
    weight of every group shrinks, whatever its sign. Asymmetric: 0 is a point of the grid, so that a pruned weight stays exactly zero.
    """
    levels = 2**bits - 1
    if symmetric:
        return half_below(high * (2 / levels)), None
    scale = half_exact((high - low) / levels)
    return scale, (-low / scale).round_().clamp_(0, levels)


def fit(W: Tensor, bits: int, symmetric: bool, dim: int = 1) -> tuple[Tensor, Tensor | None]:
    """Min-max grid along ``dim`` (kept, length 1): (scale float32, zero point float32 or None)."""
    return over(*span(W, symmetric, dim), bits, symmetric)


def limits(zero: Tensor | None, bits: int) -> tuple[Any, Any]:
    """Lowest and highest code, counted from the zero point."""
    if zero is None:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return -zero, 2**bits - 1 - zero


def quantise(W: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Nearest codes, float32 tensor of integers; shapes broadcast."""
    codes = (W / scale).round_().clamp_(*limits(zero, bits))
    return codes if zero is None else codes.add_(zero)


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return codes * scale if zero is None else (codes - zero).mul_(scale)


def store(codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The storage types: int8 or uint8 codes, float16 scales, uint8 zero points."""
    return (
        codes.to(torch.int8 if zero is None else torch.uint8),
        scale.half(),
        None if zero is None else zero.to(torch.uint8),
    )
