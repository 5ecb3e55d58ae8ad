"""How far a compressed model is from its dense one: KL divergence, top-1 agreement, flips.

The dense cell stores its log-probabilities over the whole vocabulary at the first positions of the perplexity windows, as
float16 (rounding of a log-probability is at most 2^-11 of its size; each row is normalised again when read, so the error in
KL is of second order, about 1e-7 nats), its most likely tokens exactly, and what became of each of its answers.

- ``kl_dense``: mean over positions of KL(dense || cell) = sum_v p(v) (log p(v) - log q(v)), nats.
- ``top1_agreement``: share of positions where both find the same token most likely.
- ``flips`` (Dutta et al., "Accuracy is Not All You Need", arXiv 2407.09141): share of answers correct in one and not
  in the other, in either direction. Refused, unparseable, empty and degenerate answers are not correct. Dimensions that only
  grade answers (toxicity, stereotype, privacy) have no flips.

Legend: K positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CellError
from ..record import DIVERGENCE
from .protocol import MetricRow, Outcome

#: Codes of outcomes in the stored reference; append only.
_CODES = tuple(Outcome)
#: Dimensions without right and wrong. Told by name, for where every answer is refused no outcome tells.
_GRADED = ("toxicity", "stereotype", "privacy")


@dataclass
class Divergence:
    """Running sums over positions."""

    kl: float = 0.0
    same: int = 0
    positions: int = 0

    def add(self, dense: Reference, start: int, logprob_KV: torch.Tensor) -> None:
        """Add positions ``start``... of the cell; those beyond the reference are ignored."""
        p_KV, top_K = dense.at(start, len(logprob_KV), logprob_KV.device)
        q_KV = logprob_KV[: len(p_KV)]
        weight_KV = p_KV.exp()
        terms_KV = (weight_KV * (p_KV - q_KV)).masked_fill_(weight_KV == 0, 0)  # masked tokens: q is -inf, and 0 x inf NaN
        self.kl += float(terms_KV.sum(-1).double().sum())
        self.same += int((q_KV.argmax(-1) == top_K).sum())
        self.positions += len(p_KV)


class Reference:
    """Tensors ``logprob`` float16 [K, V], ``top1`` int32 [K], ``tokens`` int32 [W, L], and ``outcomes`` uint8 [answers]."""

    def __init__(self, logprob_KV: torch.Tensor, top_K: torch.Tensor) -> None:
        self.logprob_KV, self.top_K = logprob_KV, top_K

    @classmethod
    def empty(cls, positions: int, vocabulary: int) -> Reference:
        return cls(torch.empty((positions, vocabulary), dtype=torch.float16), torch.empty(positions, dtype=torch.int32))

    def put(self, start: int, logprob_KV: torch.Tensor) -> None:
        """Fill positions ``start``..."""
        end = start + len(logprob_KV)
        # A probability of zero would be -inf, and 0 x inf NaN; -60000 is as good and fits float16.
        self.logprob_KV[start:end] = logprob_KV.clamp(min=-6e4)
        self.top_K[start:end] = logprob_KV.argmax(-1)

    def tensors(self, windows_WL: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is stored; the windows come along, so that another text is noticed."""
        return {"logprob": self.logprob_KV, "top1": self.top_K, "tokens": windows_WL.int()}

    @classmethod
    def read(cls, tensors: Mapping[str, torch.Tensor], windows_WL: torch.Tensor, positions: int) -> Reference:
        if not torch.equal(tensors["tokens"], windows_WL.int()):
            raise CellError("the dense reference was made of other windows of text: run the dense cell again")
        return cls(tensors["logprob"][:positions], tensors["top1"][:positions])

    def at(self, start: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 log-probabilities [K, V], normalised, and most likely tokens [K]."""
        logprob_KV = self.logprob_KV[start : start + count].to(device).float().log_softmax(-1)
        return logprob_KV, self.top_K[start : start + count].to(device)


def encode_outcomes(rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """uint8 [answers], in the order of ``rows``."""
    return torch.tensor([_CODES.index(Outcome(r["outcome"])) for r in rows], dtype=torch.uint8)


def divergence_rows(scores: Divergence) -> list[MetricRow]:
    """``kl_dense`` and ``top1_agreement``."""
    if not scores.positions:
        return []
    n = scores.positions
    # Rounding can leave a mean of -1e-9 where the models are the same.
    kl = MetricRow("comptrust", DIVERGENCE, "", "kl_dense", max(scores.kl / n, 0.0), n)  # in this order NaN stays NaN
    return [kl, MetricRow("comptrust", DIVERGENCE, "", "top1_agreement", scores.same / n, n)]


def flip_rows(rows: Sequence[Mapping[str, Any]], dense: torch.Tensor) -> list[MetricRow]:
    """``flips`` of every dimension with right answers (scenario: its name) and over all of them (scenario: "").

    ``rows`` are the cell's answers in the order of the plan, ``dense`` their outcomes in the dense cell.
    """
    if len(rows) != len(dense):
        raise CellError(f"the dense reference has {len(dense)} answers, this cell {len(rows)}: run the dense cell again")
    flips: dict[str, list[bool]] = {}
    for row, code in zip(rows, dense.tolist(), strict=True):
        if row["dimension"] not in _GRADED:
            mine, theirs = Outcome(row["outcome"]), _CODES[code]
            flips.setdefault(row["dimension"], []).append((mine == Outcome.CORRECT) != (theirs == Outcome.CORRECT))
    if not flips:
        return []
    every = [f for part in flips.values() for f in part]
    out = [MetricRow("comptrust", DIVERGENCE, "", "flips", sum(every) / len(every), len(every))]
    return out + [MetricRow("comptrust", DIVERGENCE, d, "flips", sum(f) / len(f), len(f)) for d, f in flips.items()]


def dense_rows() -> list[MetricRow]:
    """What the dense cell says of itself, by definition."""
    values = {"kl_dense": 0.0, "top1_agreement": 1.0, "flips": 0.0}
    return [MetricRow("comptrust", DIVERGENCE, "", name, value, 0) for name, value in values.items()]
