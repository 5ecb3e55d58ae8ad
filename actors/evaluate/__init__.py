"""Trust evaluation: one task a dimension. Tasks load lazily, so that importing the package stays cheap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from ..cell import DIMENSIONS
from .judging import spoken
from .protocol import Judgement, Task

__all__ = ["DIMENSIONS", "TASKS", "judge_many", "rejudge"]


class _Tasks(Mapping[str, Task]):
    """Name -> task of the eight dimensions and ``mmlu``; a module is imported when its task is asked for."""

    names = (*DIMENSIONS, "mmlu")

    def __getitem__(self, name: str) -> Task:
        if name not in self.names:
            raise KeyError(name)
        return import_module(f".{name}", __name__).TASK

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


TASKS: Mapping[str, Task] = _Tasks()


def judge_many(
    task: Task, targets: Sequence[Mapping[str, Any]], texts: Sequence[str], finish_reasons: Sequence[str]
) -> list[Judgement]:
    """Judge answers in one go where the task can (toxicity scores in batches), else one by one; thoughts are no part of them."""
    texts = [spoken(t) for t in texts]
    if many := getattr(task, "judge_many", None):
        return many(targets, texts, finish_reasons)
    return [task.judge(*row) for row in zip(targets, texts, finish_reasons, strict=True)]


def rejudge(dimension: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stored rows of a dimension (a name of ``TASKS``) with every text judged anew; no model needed.

    ``rows`` have the columns of table ``items`` with ``target`` parsed and ``text`` present; they are not changed.
    """
    judged = judge_many(TASKS[dimension], *([r[k] for r in rows] for k in ("target", "text", "finish_reason")))
    return [{**r, "outcome": str(j.outcome), "score": j.score} for r, j in zip(rows, judged, strict=True)]
