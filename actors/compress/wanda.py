"""Wanda: keep the weights with the largest |w_oi| * ||X_i||, compared within each output row; no weight changes its value.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695, section 3. In the authors'
code a block is scored on what it computes dense and then run again, pruned: ``variant: reference``, and ours for patterns. Ours
without a pattern scores every layer on what the pruned layers before it give, in one forward.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from .base import Inputs, PruningConfig, Solution, parse_pattern
from .masks import keep_n_of_m, keep_top, masked


class ScoredConfig(PruningConfig):
    """Pruning by a score that takes the norms of a linear's inputs."""

    dense_inputs: bool = Field(
        default=True,
        description="score a whole block on its dense inputs, as published; otherwise each layer on its inputs after pruning",
    )

    def of_the_whole_cell(self) -> set[str]:
        return {"dense_inputs"}


class WandaConfig(ScoredConfig):
    variant: Literal["comptrust", "reference"] = Field(default="comptrust", description="sets the default of `dense_inputs`")

    @model_validator(mode="before")
    @classmethod
    def _variant_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        ours = values.get("variant", "comptrust") == "comptrust"
        unstructured = values.get("pattern") in (None, "unstructured")
        return ({"dense_inputs": False} if ours and unstructured else {}) | values

    def of_the_whole_cell(self) -> set[str]:
        return {"variant", *super().of_the_whole_cell()}


def prune(score_OI: Tensor, sparsity: float, nm: tuple[int, int] | None) -> Tensor:
    """Keep-mask [O, I] that drops the share ``sparsity`` of each row, or all but N of every M inputs."""
    return keep_n_of_m(score_OI, *nm) if nm else keep_top(score_OI, int(score_OI.shape[1] * sparsity))


def solve(W_OI: Tensor, inputs: Inputs, config: WandaConfig) -> Solution:
    return Solution(masked(W_OI, prune(W_OI.abs() * inputs.norm, config.sparsity, parse_pattern(config.pattern))))
