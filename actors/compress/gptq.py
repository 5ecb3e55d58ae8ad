"""GPTQ: round column by column, each rounding error compensated on the columns behind it by the inverse Hessian.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323,
algorithm 1. ``variant: reference`` is that algorithm with the authors' damping. Ours adds three things, each a knob: groups in
order of their largest input (as GPTQModel's group-aware order), tokens with massive activations clipped before they enter the
Hessian, and the scale of each group searched under the error the sweep will charge for it, (w - q)^2 / U_ii^2.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from . import grid
from .base import Bits, GroupSize, Inputs, MethodConfig, Solution
from .second_order import inverse_factor, nested_order, sweep

VARIANTS: dict[str, dict[str, Any]] = {
    "comptrust": {"order": "group-aware", "damping": 0.05, "token_clip": 8.0, "scale_search": 8},
    "reference": {"order": "none", "damping": 0.01, "token_clip": None, "scale_search": 0},
}


class GptqConfig(MethodConfig):
    bits: Bits = Field(default=4, description="bits per code")
    group_size: GroupSize = 128
    symmetric: bool = Field(default=True, description="no zero points")
    variant: Literal["comptrust", "reference"] = Field(default="comptrust", description="sets the defaults of the knobs below")
    order: Literal["none", "act", "group-aware"] = Field(
        default="group-aware",
        description="columns in given order, by activation (needs a group index per input), or by whole groups",
    )
    damping: float = Field(
        default=0.05, gt=0, le=1, description="share of the mean diagonal added to the Hessian; escalated on failure"
    )
    token_clip: float | None = Field(
        default=8.0, ge=1, description="no token counts for more than this many median tokens; null: all do"
    )
    scale_search: int = Field(
        default=8, ge=0, le=100, description="scales tried per group between 1 and 0.7 of min-max; 0: min-max"
    )

    @model_validator(mode="before")
    @classmethod
    def _variant_defaults(cls, values: Any) -> Any:
        return VARIANTS.get(str(values.get("variant", "comptrust")), {}) | values if isinstance(values, dict) else values


class Grid:
    """Sweep policy: the grid of a group is fitted when the sweep reaches it, so it sees every earlier error fed back.

    A block is swept in units of its scales, so that rounding a row is no more than rounding.
    """

    def __init__(self, W_IO: Tensor, U_II: Tensor, bits: int, group_size: int | None, symmetric: bool, search: int) -> None:
        self.bits, self.symmetric, self.search = bits, symmetric, search
        self.group = group_size or len(W_IO)
        self.block = self.group if self.group <= 256 else 128
        self.micro = 16
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor] = []
        self.W, self.U = W_IO, U_II

    def begin_block(self, W_BO: Tensor, diag_B: Tensor, start: int) -> None:
        if start % self.group == 0:
            rows = slice(start, start + self.group)
            self.fit(self.W[rows], self.U.diagonal()[rows])
        W_BO.div_(self.scale)

    def fit(self, W_GO: Tensor, diag_G: Tensor) -> None:
        low, high = grid.span(W_GO, self.symmetric, dim=0)
        scale, zero = grid.over(low, high, self.bits, self.symmetric)
        if self.search:
            weight_G = diag_G.reciprocal().square()
            best = torch.full_like(scale[0], torch.inf)
            V, Q = torch.empty_like(W_GO), torch.empty_like(W_GO)
            for shrink in torch.linspace(1, 0.7, self.search).tolist():
                s, z = grid.over(low * shrink, high * shrink, self.bits, self.symmetric)
                torch.div(W_GO, s, out=V)
                torch.round(V, out=Q).clamp_(*grid.limits(z, self.bits))
                error = (weight_G @ V.sub_(Q).square_()).mul_(s[0].square())
                better = error < best
                best = torch.where(better, error, best)
                scale = torch.where(better, s, scale)
                if zero is not None:
                    zero = torch.where(better, z, zero)
        self.scale, self.limits = scale[0], grid.limits(None if zero is None else zero[0], self.bits)
        self.scales.append(self.scale)
        if zero is not None:
            self.zeros.append(zero[0])

    def begin_micro(self, W_MO: Tensor, diag_M: Tensor, start: int) -> None:
        pass

    def row(self, w_O: Tensor, i: int, out_O: Tensor) -> None:
        torch.round(w_O, out=out_O).clamp_(*self.limits)

    def end_block(self, Q_BO: Tensor, E_BO: Tensor) -> None:
        Q_BO.mul_(self.scale)
        E_BO.mul_(self.scale)


def read_codes(W_IO: Tensor, perm_I: Tensor, policy: Grid, contiguous: bool) -> Solution:
    """The swept rows (in order ``perm_I``) as a Solution in the layer's own order; ``contiguous``: groups lie side by side."""
    I = len(W_IO)
    scale_GO = torch.stack(policy.scales)
    zero_GO = torch.stack(policy.zeros) if policy.zeros else None
    inverse = perm_I.argsort()
    group_I = (torch.arange(I, device=W_IO.device) // policy.group)[inverse]
    W = W_IO[inverse]
    codes = grid.quantise(W, scale_GO[group_I], None if zero_GO is None else zero_GO[group_I], policy.bits)
    if contiguous:
        first = group_I[:: policy.group]
        scale_GO, zero_GO = scale_GO[first], None if zero_GO is None else zero_GO[first]
    codes, scale, zero = grid.store(codes.T, scale_GO.T, None if zero_GO is None else zero_GO.T)
    return Solution(
        W.T.contiguous(), codes.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous(),
        group_index=None if contiguous else group_I.to(torch.int32),
    )  # fmt: skip


def solve(W_OI: Tensor, inputs: Inputs, config: GptqConfig) -> Solution:
    H = inputs.gram
    diag = H.diagonal()
    dead = diag == 0
    group = config.group_size
    if config.order == "none":
        perm = torch.arange(len(H), device=H.device)
    else:
        perm = nested_order(diag, *([group] if group and config.order == "group-aware" else []))
    H = H[perm][:, perm]
    W_IO = W_OI.T[perm].contiguous()
    if dead.any():  # an input that is always zero: its weights cannot matter, and a unit diagonal keeps H regular
        H.diagonal()[dead[perm]] = 1.0
        W_IO[dead[perm]] = 0.0
    U = inverse_factor(H, config.damping, name=", ".join(inputs.names))
    policy = Grid(W_IO, U, config.bits, group, config.symmetric, config.scale_search)
    sweep(W_IO, U, policy)
    return read_codes(W_IO, perm, policy, contiguous=config.order != "act" or group is None)
