"""Wanda: keep the weights with the largest |w_oi| * ||X_i||, compared within each output row; no weight changes its value.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695, section 3. As in the authors'
code a block is scored on what it computes dense and then run again, pruned.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from .base import Inputs, PruningConfig, Solution, parse_pattern
from .masks import keep_n_of_m, keep_top


class WandaConfig(PruningConfig):
    dense_inputs: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of the sequences on which inputs inside a block are taken before it is pruned; 0: after, in one forward",
    )


def prune(score_OI: Tensor, sparsity: float, nm: tuple[int, int] | None) -> Tensor:
    """Keep-mask [O, I] that drops the share ``sparsity`` of each row, or all but N of every M inputs."""
    return keep_n_of_m(score_OI, *nm) if nm else keep_top(score_OI, int(score_OI.shape[1] * sparsity))


def solve(W_OI: Tensor, inputs: Inputs, config: WandaConfig) -> Solution:
    return Solution(W_OI.where(prune(W_OI.abs() * inputs.norm, config.sparsity, parse_pattern(config.pattern)), 0.0))
