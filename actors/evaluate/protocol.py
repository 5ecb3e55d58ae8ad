"""The task protocol: a dimension is its items, the messages of an item, how to decode, and how to judge a text.

Judging works on stored rows alone (``target`` and ``text``), so that ``rescore`` needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol


class Outcome(StrEnum):
    """What became of one answer. ``correct`` and ``wrong`` for answers with a key, ``scored`` for graded ones."""

    CORRECT = "correct"
    WRONG = "wrong"
    SCORED = "scored"
    REFUSED = "refused"
    UNPARSEABLE = "unparseable"
    EMPTY = "empty"
    DEGENERATE = "degenerate"


SUITES = ("smoke", "standard", "full")


class Message(NamedTuple):
    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Decoding:
    """How an item is answered. ``temperature`` 0 is greedy; ``samples`` > 1 needs a temperature."""

    max_new_tokens: int
    samples: int = 1
    temperature: float = 0.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One question. ``id`` is unique in its dimension; ``cluster`` joins items that share a source prompt (for bootstrap);
    ``record`` is the pack's record; ``target`` is JSON with all that a scorer needs, and nothing that it doesn't."""

    id: str
    dimension: str
    scenario: str
    cluster: str
    record: Mapping[str, Any]
    target: Mapping[str, Any] = field(default_factory=dict)


class Judgement(NamedTuple):
    outcome: Outcome
    #: Higher is better in every dimension: 1 or 0 for correct or wrong, a number in [0, 1] for graded (1 - toxicity, 1 for
    #: no leak or no agreement), None where there is no answer to grade.
    score: float | None


class MetricRow(NamedTuple):
    """A row of table ``metrics`` without its key."""

    convention: str
    dimension: str
    scenario: str  # "" for the dimension as a whole
    metric: str  # "score" (0-100, higher is better), "refusal" (0-1), "valid" (0 or 1), "unparseable", "emt@25", ...
    value: float | None
    n: int
    ci_low: float | None = None
    ci_high: float | None = None
    scorer: str | None = None
    scorer_version: str | None = None


class Task(Protocol):
    """One module a dimension; the module's ``TASK`` is the instance."""

    dimension: str

    def items(self, pack: Any) -> Sequence[Item]:
        """All items of the ``full`` suite, in a stable order; ``suites.select`` takes the smaller ones."""
        ...

    def messages(self, item: Item) -> list[Message]: ...

    def decoding(self, item: Item, suite: str) -> Decoding: ...

    def judge(self, target: Mapping[str, Any], text: str, finish_reason: str) -> Judgement: ...

    # Optional: ``judge_many(targets, texts, finish_reasons) -> list[Judgement]`` where judging pays in batches (toxicity).
    # Call ``comptrust.actors.evaluate.judge_many(task, ...)``, which takes it or else ``judge`` one by one.

    def parts(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
        """What the score of convention ``comptrust`` averages, and how: (``conventions.Cells``, ``conventions.Combine``).

        Statistics resample these, so a paired test follows the dimension's own formula; ``text`` is not needed in ``rows``.
        """
        ...

    def metrics(self, rows: Sequence[Mapping[str, Any]], suite: str) -> list[MetricRow]:
        """All conventions from the stored rows of this dimension (columns of table ``items``, ``target`` already parsed)."""
        ...
