"""Weights on a pattern or a grid, made without the code under test."""

from __future__ import annotations

import torch
import torch.nn.functional as F

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8), "8:16": (8, 16)}
BITS = {"int3": 3, "int4": 4, "int8": 8, "2:4+int4": 4}


def pattern_mask(shape: tuple[int, int], pattern: str, seed: int, sparsity: float = 0.5) -> torch.Tensor:
    """A random boolean mask [O, I] that keeps exactly n of m (or each weight with probability 1 - sparsity)."""
    g = torch.Generator().manual_seed(seed)
    if pattern == "bitmap":
        return torch.rand(shape, generator=g) >= sparsity
    n, m = PATTERNS[pattern]
    wide = torch.rand(shape[0], -(-shape[1] // m), m, generator=g)
    keep = wide.argsort(-1)[..., :n]
    return torch.zeros(wide.shape, dtype=torch.bool).scatter_(-1, keep, True).flatten(1)[:, : shape[1]]


def weight(shape, format, *, dtype=torch.float32, group_size=32, seed=0, sparsity=0.5, zero_point=True):
    """A weight that ``format`` can hold, and the keyword arguments of ``pack``."""
    g = torch.Generator().manual_seed(seed)
    if format not in BITS:
        W = torch.randn(shape, generator=g).to(dtype)
        return torch.where(pattern_mask(shape, format, seed, sparsity), W, torch.zeros((), dtype=dtype)), {}
    bits, groups = BITS[format], -(-shape[1] // group_size)
    scale = ((torch.rand(shape[0], groups, generator=g) + 0.5) / 2**bits).to(dtype)
    zero = torch.randint(1, 2**bits - 1, (shape[0], groups), generator=g)
    codes = torch.randint(0, 2**bits, shape, generator=g)
    wide = [F.pad(t.repeat_interleave(group_size, 1), (0, 0))[:, : shape[1]] for t in (scale.double(), zero.double())]
    z = wide[1] if zero_point else 2 ** (bits - 1)
    W = ((codes - z) * wide[0]).to(torch.float32).to(dtype)
    if format.startswith("2:4"):
        W = torch.where(pattern_mask(shape, "2:4", seed), W, torch.zeros((), dtype=dtype))
    return W + 0.0, {"scale": scale, "zero": zero if zero_point else None, "group_size": group_size}


def error(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor) -> float:
    """Norm of y - x W^T in float64 over the norm of |x| |W|^T: what rounding can do, also where a sum cancels.

    ``W`` is dense with its zeros, so a kernel that ignores the pattern is wrong by order one. Infinite if anything is not finite.
    """
    x, W = x.double().cpu(), W.double().cpu()
    off = (y.double().cpu() - x @ W.T).norm() / (x.abs() @ W.abs().T).norm()
    return float(off) if torch.isfinite(off) else float("inf")


#: Bounds of ``error``: one rounding of the result to 16 bits (2^-11, 2^-8) and of some weights, averaged by the norm.
BOUND = {"torch.float16": 3e-4, "torch.bfloat16": 3e-3}


def probes(columns: int, shifts: int):
    """Weights with a single one in every row, at a column that moves with the row, and the x that tells every column apart.

    Yields (W, x, the exact result): any slip of an index changes a value, and all values are exact in 16 bits.
    """
    x = torch.tensor([(k % 64 + 1.0) * (-1.0) ** (k // 64) * 2.0 ** (k // 128) for k in range(columns)], dtype=torch.float16)[
        None
    ]
    assert x.unique().numel() == columns
    n = torch.arange(columns + 5)
    for shift in range(0, columns, columns // shifts):
        W = torch.zeros(len(n), columns, dtype=torch.float16)
        at = (5 * n + shift) % columns
        W[n, at] = 1
        yield W, x, x[:, at]


def identity_scale(rows: int, format: str) -> dict:
    """Arguments under which a 1 is on the grid of an integer format."""
    return {"scale": torch.ones(rows, 1).half(), "zero": torch.ones(rows, 1)} if format in BITS else {}
