"""SparseGPT: prune column by column, what is lost compensated on the columns behind; optionally quantise in the same sweep.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv:2301.00774, algorithm
1 and section 3.5 (joint sparsification and quantisation). ``variant: reference`` is that algorithm. Ours, for N:M patterns,
visits groups of M in order of their largest input and clips tokens with massive activations before they enter the Hessian; and
the weights kept then go on towards the least squares solution of their mask, which the sweep only approximates.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .base import Bits, GroupSize, Inputs, PruningConfig, Solution, parse_pattern
from .gptq import Grid, read_codes
from .masks import keep_n_of_m, keep_top
from .second_order import inverse_factor, nested_order, sweep

TINY = torch.finfo(torch.float32).tiny
#: Steps by default: each costs a product with the Hessian, about a tenth of a forward of 8192 tokens.
REFIT = 2


class SparseGptConfig(PruningConfig):
    bits: Bits | None = Field(default=None, description="quantise the kept weights too; null: they stay in the model's dtype")
    group_size: GroupSize = Field(default=None, description="weights per scale if bits is set; null: per channel")
    symmetric: bool = Field(default=True, description="no zero points, if bits is set")
    variant: Literal["comptrust", "reference"] = Field(default="comptrust", description="sets the defaults of the knobs below")
    order: Literal["none", "group-aware"] = Field(
        default="none", description="columns in given order, or by groups with large inputs first"
    )
    damping: float = Field(
        default=0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian; escalated on failure"
    )
    token_clip: float | None = Field(
        default=None, ge=1, description="no token counts for more than this many median tokens; null: all do"
    )
    block: int = Field(default=128, ge=16, le=1024, description="columns whose mask is chosen together (unstructured)")
    refit: int = Field(
        default=0, ge=0, le=100, description="conjugate gradient steps of the kept weights after the sweep; without bits only"
    )

    @model_validator(mode="before")
    @classmethod
    def _variant_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        ours = values.get("variant", "comptrust") == "comptrust"
        structured = values.get("pattern") not in (None, "unstructured")
        defaults: dict[str, Any] = {"order": "group-aware", "token_clip": 8.0} if ours and structured else {}
        if ours and not values.get("bits"):
            defaults["refit"] = REFIT
        return defaults | values

    def impossible(self) -> str | None:
        if self.group_size and not self.bits:
            return f"group size {self.group_size} without bits: pruned weights that are not quantised have no scales"
        if self.refit and self.bits:
            return f"refit {self.refit} with {self.bits} bits: refitted weights would leave their grid"
        width = self.width()
        if self.group_size and self.group_size % width:
            fits = -(-self.group_size // width) * width
            return f"group size {self.group_size} tears groups of {width} apart, which {self.pattern} is stored in (try {fits})"
        return super().impossible()

    def misfit(self, name: str, inputs: int) -> str | None:
        why = super().misfit(name, inputs)
        if why is None and inputs % self.width():
            return (
                f"the {inputs} inputs of {name} do not split into groups of {self.width()}, which {self.pattern} is stored in"
            )
        return why

    def width(self) -> int:
        """Neighbouring inputs that are stored together; 1:2 with 4 bits is stored as 2:4."""
        if self.pattern == "1:2" and self.bits == 4:
            return 4
        return (parse_pattern(self.pattern) or (0, 1))[1]


class Prune(Grid):
    """Sweep policy: a mask per block and linear, or N of every M rows chosen as the sweep reaches them; then maybe the grid."""

    def __init__(self, W_IO: Tensor, U_II: Tensor, config: SparseGptConfig, outs: list[int]) -> None:
        super().__init__(W_IO, U_II, config.bits or 0, config.group_size, config.symmetric, search=0)
        self.outs, self.sparsity, self.nm = outs, config.sparsity, parse_pattern(config.pattern)
        self.micro = self.nm[1] if self.nm else 16
        self.block = min(config.block, self.group)
        if self.nm:
            self.block = max(self.block // self.micro, 1) * self.micro
        self.wide = config.block // self.group * self.group  # as many whole groups as fit: what a mask reaches over
        self.masked = 0  # rows whose mask is chosen

    def begin_block(self, W_BO: Tensor, diag_B: Tensor, start: int) -> None:
        if self.nm:
            self.keep = torch.ones_like(W_BO)
        elif start < self.masked:
            self.keep = self.keep[self.block :]
        else:
            rows = slice(start, start + max(self.wide, len(W_BO)))
            score = (self.W[rows] / self.U.diagonal()[rows, None]).square_()
            self.keep = torch.ones_like(score)
            for s, k in zip(score.split(self.outs, 1), self.keep.split(self.outs, 1), strict=True):
                k.copy_(keep_top(s.reshape(-1), int(s.numel() * self.sparsity)).view(s.shape))
            self.masked = start + len(score)
        if self.bits:
            super().begin_block(W_BO, diag_B, start)

    def begin_micro(self, W_MO: Tensor, diag_M: Tensor, start: int) -> None:
        if self.nm:
            score = (W_MO / diag_M[:, None]).square_()
            self.keep[start : start + len(W_MO)] = keep_n_of_m(score.T, *self.nm).T

    def row(self, w_O: Tensor, i: int, out_O: Tensor) -> None:
        torch.mul(w_O, self.keep[i], out=out_O)
        if self.bits:
            super().row(out_O, i, out_O)

    def end_block(self, Q_BO: Tensor, E_BO: Tensor) -> None:
        if self.bits:
            super().end_block(Q_BO, E_BO)


def refit(V_OI: Tensor, W_OI: Tensor, H_II: Tensor, damping: float, steps: int) -> Tensor:
    """``V_OI`` closer to the minimum of ||(V - W) X||^2 + damping * mean(diag H) * ||V - W||^2 over its own non-zeros.

    Conjugate gradients on all rows side by side, preconditioned by the diagonal (Saad 2003, *Iterative Methods*, algorithm 9.1); a row
    has its own step sizes.
    """
    keep = V_OI != 0
    ridge = damping * H_II.diagonal().mean()
    diag = (H_II.diagonal() + ridge).clamp_min(TINY)
    D = W_OI - V_OI
    R = ((D @ H_II).add_(D, alpha=float(ridge))).mul_(keep)
    V = V_OI.clone()
    P = Z = R / diag
    rz = (R * Z).sum(1, keepdim=True)
    for left in reversed(range(steps)):
        Q = (P @ H_II).add_(P, alpha=float(ridge)).mul_(keep)
        step = rz / (P * Q).sum(1, keepdim=True).clamp_min_(TINY)
        V.addcmul_(P, step)
        if not left:
            break
        R.addcmul_(Q, step, value=-1)
        Z = R / diag
        new = (R * Z).sum(1, keepdim=True)
        P = Z.addcmul(P, new / rz.clamp_min(TINY))
        rz = new
    return V


def solve(W_OI: Tensor, inputs: Inputs, config: SparseGptConfig) -> Solution:
    H = inputs.gram
    diag = H.diagonal()
    dead = diag == 0
    if config.order == "none":
        perm = torch.arange(len(H), device=H.device)
    else:
        nm = parse_pattern(config.pattern)
        perm = nested_order(diag, *([nm[1]] if nm else []), *([config.group_size] if config.group_size else []))
    H = H[perm][:, perm]
    W_IO = W_OI.T[perm].contiguous()
    if dead.any():
        H.diagonal()[dead[perm]] = 1.0
        W_IO[dead[perm]] = 0.0
    U = inverse_factor(H, config.damping, name=", ".join(inputs.names))
    policy = Prune(W_IO, U, config, inputs.outs)
    sweep(W_IO, U, policy)
    if config.bits:
        return read_codes(W_IO, perm, policy, contiguous=True)
    V_OI = W_IO[perm.argsort()].T.contiguous().add_(0.0)  # no -0 from the product with the mask
    return Solution(refit(V_OI, W_OI, inputs.gram, config.damping, config.refit) if config.refit else V_OI)
