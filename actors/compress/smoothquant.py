"""SmoothQuant: W8A8 with outliers of the activations moved into the weights, simulated.

Xiao et al. 2022, "SmoothQuant", arXiv:2211.10438, equation 4: s_i = max|X_i|^a / max|W_i|^(1-a), for the inputs that come from
a norm. Weights are int8 per output channel, activations int8 per token, scaled at run time ("dynamic"); the product runs in the
model's dtype, which changes nothing but its speed.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Inputs, MethodConfig, Solution
from .rtn import round_to_nearest


class SmoothQuantConfig(MethodConfig):
    bits: Literal[2, 3, 4, 8] = Field(default=8, description="only 8 exists, for weights and activations")
    alpha: float = Field(default=0.5, ge=0, le=1, description="share of the outliers moved into the weights")

    def impossible(self) -> str | None:
        return None if self.bits == 8 else f"SmoothQuant is W8A8, not {self.bits} bits"


def round_tokens(x: Tensor) -> Tensor:
    """``x`` [..., I] with every token on its own symmetric int8 grid, same dtype."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-12) / 127
    return ((x / scale).round_().clamp_(-127, 127) * scale).to(x.dtype)


class W8A8Linear(nn.Linear):
    """A linear whose input is rounded to int8 per token; ``input_scale`` [I] divides it first where it could not be folded."""

    input_scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            x = (x / self.input_scale).to(x.dtype)
        return F.linear(round_tokens(x), self.weight, self.bias)


def replace(linear: nn.Linear, config: SmoothQuantConfig) -> W8A8Linear:
    module = W8A8Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    module.weight, module.bias = linear.weight, linear.bias
    return module.eval()


def solve(W_OI: Tensor, inputs: Inputs, config: SmoothQuantConfig) -> Solution:
    scale_I = None
    if inputs.fold is not None and inputs.fold.kind != "linear":
        scale_I = (
            inputs.max_abs.clamp(min=1e-5).pow(config.alpha) / W_OI.abs().amax(0).clamp(min=1e-5).pow(1 - config.alpha)
        ).clamp_(min=1e-5)
    solution = round_to_nearest(W_OI if scale_I is None else W_OI * scale_I, 8, None, symmetric=True)
    solution.input_scale = scale_I
    return solution
