"""Magnitude pruning: the smallest |w| go. Per layer (as the Wanda repository's baseline), per row, or over the whole model.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", arXiv:1506.02626.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .base import Inputs, PruningConfig, Solution, parse_pattern
from .masks import keep_n_of_m, keep_top, kth_smallest, masked


class MagnitudeConfig(PruningConfig):
    scope: Literal["layer", "row", "global"] = Field(
        default="layer", description="where the sparsity holds; a pattern is always per row"
    )

    def of_the_whole_cell(self) -> set[str]:
        return {"scope", "sparsity", "pattern"} if self.scope == "global" else {"scope"}


def solve(W_OI: Tensor, inputs: Inputs, config: MagnitudeConfig) -> Solution:
    nm = parse_pattern(config.pattern)
    score = W_OI.abs()
    if nm:
        keep = keep_n_of_m(score, *nm)
    elif config.scope == "row":
        keep = keep_top(score, int(W_OI.shape[1] * config.sparsity))
    elif config.scope == "global":
        keep = torch.cat([inputs.context.keep(n, s) for n, s in zip(inputs.names, score.split(inputs.outs), strict=True)])
    else:
        keep = torch.cat(
            [keep_top(s.reshape(-1), int(s.numel() * config.sparsity)).view(s.shape) for s in score.split(inputs.outs)]
        )
    return Solution(masked(W_OI, keep))


class GlobalThreshold:
    """One threshold for every linear of the model, exact in count: ties at the threshold go in order of layer and index."""

    def __init__(self, linears: dict[str, nn.Linear], sparsity: float) -> None:
        # A histogram refined twice would save memory on huge models; one flat copy of |w| in float32 is simpler and exact.
        scores = torch.cat([m.weight.detach().abs().float().reshape(-1).cpu() for m in linears.values()])
        drop = max(1, int(scores.numel() * sparsity))
        self.limit = kth_smallest(scores, drop)[0]
        spare = drop - int((scores < self.limit).sum())
        del scores
        self.spare: dict[str, int] = {}
        for name, linear in linears.items():
            ties = int((linear.weight.detach().abs().float().cpu() == self.limit).sum())
            self.spare[name] = min(spare, ties)
            spare -= self.spare[name]

    def keep(self, name: str, score_OI: Tensor) -> Tensor:
        limit = self.limit.to(score_OI.device)
        ties = (score_OI == limit).reshape(-1)
        return (score_OI > limit) | (ties & (ties.cumsum(0) > self.spare[name])).view(score_OI.shape)


def prepare(model: nn.Module, linears: dict[str, nn.Linear], config: MagnitudeConfig, **_: Any) -> GlobalThreshold | None:
    return GlobalThreshold(linears, config.sparsity) if config.scope == "global" and not parse_pattern(config.pattern) else None
