"""AWQ: scale up the inputs that matter before rounding, fold the inverse scale into what produces them.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", arXiv:2306.00978, section 3.2:
s = mean|x|^r over a grid of r in [0, 1), here with the weights' share in it as its authors' code has (`duo`). The loss of a
point, ||(Q(W s) / s - W) X||^2, is tr(D H D') with H = X'X: no module runs again and the number of tokens does not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from . import grid
from .base import Bits, GroupSize, Inputs, MethodConfig, Solution
from .structure import share_heads

#: Output rows on which the exponent is chosen. The loss is a sum over rows, so an even sample of them ranks the same exponents.
ROWS = 512


class AwqConfig(MethodConfig):
    bits: Bits = Field(default=4, description="bits per code")
    group_size: GroupSize = 128
    symmetric: bool = Field(default=False, description="no zero points")
    variant: Literal["comptrust", "reference"] = Field(
        default="comptrust", description="sets the defaults of `clip` and `shared_heads`"
    )
    grid: int = Field(default=20, ge=1, le=200, description="exponents tried between 0 and 1")
    duo: bool = Field(default=True, description="divide by the weights' mean share as well: s = x^r / w^(1-r)")
    clip: bool = Field(default=True, description="search the clipping range of each group")
    shared_heads: bool = Field(default=True, description="scale attention's output too where query heads share a value head")
    token_clip: float | None = Field(default=None, ge=1, description="no token counts for more than this many median tokens")

    @model_validator(mode="before")
    @classmethod
    def _variant_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("variant") == "reference":
            return {"clip": False, "shared_heads": False} | values
        return values


def round_scaled(W_OI: Tensor, bits: int, group: int, symmetric: bool, shrink: Tensor | float = 1.0) -> tuple[Tensor, ...]:
    """(weights, codes, scale, zero) of ``W_OI`` on grids fitted to ``shrink`` times each group's range: [O, G, g or 1]."""
    W = W_OI.view(len(W_OI), -1, group)
    scale, zero = grid.fit(W * shrink, bits, symmetric, dim=2)
    codes = grid.quantise(W, scale, zero, bits)
    return grid.dequantise(codes, scale, zero), codes, scale, zero


def loss_of(H_II: Tensor) -> Callable[[Tensor], float]:
    """tr(D H D') as a function of D [O, I]. H is symmetric: on a CPU only its upper blocks are multiplied, 10/16 of the work."""
    I = len(H_II)
    cuts = [0, I] if H_II.device.type != "cpu" or I < 256 else [I * k // 4 for k in range(5)]
    columns = [(low, high, H_II[:high, low:high].clone()) for low, high in itertools.pairwise(cuts)]
    for low, _, H in columns:
        H[:low] *= 2

    def loss(D_OI: Tensor) -> float:
        return float(sum((D_OI[:, :high] @ H).mul_(D_OI[:, low:high]).sum() for low, high, H in columns))

    return loss


def search_scale(W_OI: Tensor, inputs: Inputs, config: AwqConfig) -> Tensor:
    """The input scale [I] with the least ||(Q(W s)/s - W) X|| on the grid; geometric mean of its extremes is 1."""
    group = config.group_size or W_OI.shape[1]
    a = W_OI.abs().view(len(W_OI), -1, group)
    w_I = (a / a.amax(2, keepdim=True).add_(1e-6)).view(W_OI.shape).mean(0)
    x_I = inputs.mean_abs
    W = W_OI[:: -(-len(W_OI) // ROWS)].contiguous()
    loss_at = loss_of(inputs.gram)
    best, best_s = torch.inf, torch.ones_like(x_I)
    for r in torch.arange(config.grid).div(config.grid).tolist():
        s = (x_I.pow(r) / (w_I.pow(1 - r) + 1e-4) if config.duo else x_I.pow(r)).clamp_(min=1e-4)
        s = share_heads(s / (s.max() * s.min()).sqrt(), inputs.fold)
        D = round_scaled(W * s, config.bits, group, config.symmetric)[0].view(W.shape).div_(s).sub_(W)
        loss = loss_at(D)
        if loss < best:
            best, best_s = loss, s
    return best_s


def search_clip(W_OI: Tensor, H_II: Tensor, config: AwqConfig) -> Tensor:
    """Share [O, G, 1] in (0.5, 1] of each group's range with the least error of that group's own inputs.

    As the authors' code, which also ignores what groups do to each other; here by the blocks of H on its diagonal.
    """
    group = config.group_size or W_OI.shape[1]
    W = W_OI.view(len(W_OI), -1, group)
    G = W.shape[1]
    H_Ggg = torch.stack([H_II[i * group : (i + 1) * group, i * group : (i + 1) * group] for i in range(G)])
    best = torch.full((*W.shape[:2], 1), torch.inf, device=W.device)
    share = torch.ones_like(best)
    for k in range(10):
        p = 1 - k / 20
        D = round_scaled(W_OI, config.bits, group, config.symmetric, p)[0].sub_(W).transpose(0, 1)  # [G, O, g]
        loss = (D @ H_Ggg).mul_(D).sum(2).T[..., None]
        better = loss < best
        best = torch.where(better, loss, best)
        share = torch.where(better, p, share)
    return share


def solve(W_OI: Tensor, inputs: Inputs, config: AwqConfig) -> Solution:
    """Without a place to fold a scale into, the scale stays 1 and only the clipping is searched."""
    group = config.group_size or W_OI.shape[1]
    foldable = inputs.fold is not None and (config.shared_heads or inputs.fold.repeat == 1)
    s = search_scale(W_OI, inputs, config) if foldable else torch.ones(W_OI.shape[1], device=W_OI.device)
    Ws = W_OI * s
    share = search_clip(Ws, inputs.gram / (s[:, None] * s), config) if config.clip else 1.0
    weight, codes, scale, zero = round_scaled(Ws, config.bits, group, config.symmetric, share)
    codes, scale, zero = grid.store(codes, scale[..., 0], None if zero is None else zero[..., 0])
    return Solution(weight.reshape(W_OI.shape), codes.reshape(W_OI.shape), scale, zero, input_scale=s if foldable else None)
