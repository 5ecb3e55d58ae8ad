"""Tasks of lm-evaluation-harness through its Python API, computed by our engine (extra ``lm-eval``).

``Engine`` is the harness's own Hugging Face model with two methods replaced, likelihoods and generation, so tokenisation,
few-shot prompts and metrics are the harness's. Prompts are the task's defaults, without chat template.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from ..errors import BadInput
from ..record import UTILITY
from .generate import Generator, Prompt
from .protocol import Decoding, MetricRow

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as e:
    raise BadInput(
        f"lm-evaluation-harness cannot be imported ({e})",
        where="evaluation.lm_eval",
        fix="Install it: pip install 'comptrust[lm-eval]', or leave evaluation.lm_eval out",
    ) from e

#: A bootstrap of 1,000 draws is one piece of work to the harness; it would fork as many processes as there are CPUs for it.
os.environ.setdefault("DISABLE_MULTIPROC", "1")


class Engine(HFLM):
    """The harness's view of a ``Generator``."""

    def __init__(self, generator: Generator) -> None:
        super().__init__(
            pretrained=generator.model,
            tokenizer=generator.tokenizer,
            batch_size=generator.batch_size,
            max_length=generator.limit,
        )
        self.generator = generator

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        return [(r.logprob, r.greedy) for r in self.generator.score([(context, end) for _, context, end in requests])]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        by_decoding: dict[Decoding, list[int]] = {}
        names = _names(requests)
        for i, request in enumerate(requests):
            by_decoding.setdefault(_decoding(request.args[1], self.max_gen_toks), []).append(i)
        out: dict[int, str] = {}
        for decoding, members in by_decoding.items():
            room = self.max_length - decoding.max_new_tokens
            prompts = [Prompt(names[i], tuple(self.tok_encode(requests[i].args[0], left_truncate_len=room))) for i in members]
            answers = self.generator.generate(prompts, decoding)
            out |= {i: a.text for i, a in zip(members, answers, strict=True)}
        return [out[i] for i in range(len(requests))]


def _names(requests: Sequence[Any]) -> list[str]:
    """What keys each request's noise. A task with ``repeats`` hands one request over several times, for as many draws."""
    asked: Counter[str] = Counter()
    names = []
    for r in requests:
        name = f"{r.task_name}/{r.doc_id}/{r.idx}"
        names.append(f"{name}/{asked[name]}" if asked[name] else name)
        asked[name] += 1
    return names


def _decoding(wanted: dict[str, Any], max_new_tokens: int) -> Decoding:
    until = wanted.get("until") or ()
    temperature = float(wanted.get("temperature") or 0) if wanted.get("do_sample") else 0.0
    return Decoding(
        int(wanted.get("max_gen_toks") or wanted.get("max_new_tokens") or max_new_tokens),
        temperature=temperature,
        stop=(until,) if isinstance(until, str) else tuple(until),
    )


def check_tasks(names: Sequence[str]) -> None:
    """``BadInput`` for a task the harness does not have, or that two names stand for."""
    index = TaskManager().task_index  # patterns such as mmlu_* are its command line's alone
    if unknown := [n for n in names if n not in index]:
        if unknown[0].endswith((".yaml", ".yml")) or "/" in unknown[0]:
            import lm_eval.tasks

            raise BadInput(
                f"{unknown[0]!r} is a file; tasks of lm-evaluation-harness are given by name, of those in its own folder",
                where="evaluation.lm_eval",
                fix=f"Copy the file to {lm_eval.tasks.__path__[0]} on every machine and give the name in its field `task`; a file "
                "that changes needs another name, for cells are known by it",
            )
        raise BadInput(
            f"lm-evaluation-harness has no task {unknown[0]!r}", where="evaluation.lm_eval", fix="See `lm_eval --tasks list`"
        )
    named: dict[str, str] = {}
    # A tag is its tasks, and a task may be named twice; a group is a thing of its own.
    for name in (each for n in names for each in (index[n].tags if index[n].kind.name == "TAG" else [n])):
        for task in _members(name, index):
            if (other := named.setdefault(task, name)) != name:
                raise BadInput(
                    f"lm-evaluation-harness's task {task!r} is in both {other!r} and {name!r}",
                    where="evaluation.lm_eval",
                    fix="Keep one of them",
                )


def _members(name: str, index: Mapping[str, Any]) -> set[str]:
    """The tasks that a name of the harness (task, group or tag) stands for; those that a group defines inline are left out."""
    entry = index.get(name)
    kind = entry and entry.kind.name
    members = entry.tags if kind == "TAG" else (entry.cfg or {}).get("task") if kind == "GROUP" else None
    if not isinstance(members, list | set):
        return {name} if entry else set()
    return set().union(*(_members(m if isinstance(m, str) else m.get("group") or m.get("task"), index) for m in members))


def load_tasks(tasks: Sequence[Any]) -> TaskManager:
    """The harness's manager with ``tasks`` (names, or configurations as the harness takes them) and their data in it.

    ``BadInput`` where the data cannot be had; the harness itself reads them when all else of a cell is done.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(0)  # some tasks shuffle their choices when they are read
    np.random.seed(0)
    manager = TaskManager()
    try:
        loaded = manager.load(list(tasks))
    except Exception as e:  # of the harness, the hub, or the task's own Python
        raise BadInput(
            f"lm-evaluation-harness cannot load its tasks {', '.join(map(str, tasks))}: {type(e).__name__}: {e}",
            where="evaluation.lm_eval",
            fix="Check the connection to the hub, or leave the task out",
        ) from e
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    manager.load = lambda task_list: loaded
    return manager


def evaluate_tasks(
    generator: Generator,
    tasks: TaskManager,
    *,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[MetricRow]:
    """One row a task and metric, dimension ``utility``, scenario the task's name; intervals from the harness's standard errors.

    ``tasks`` are of ``load_tasks``.
    """
    report = progress or (lambda stage, done, total: None)
    names = list(tasks.load([])["tasks"])
    report("lm-eval", 0, len(names))
    with redirect_stdout(sys.stderr):  # the harness tells there what it bootstraps
        results = simple_evaluate(
            Engine(generator),  # pyright: ignore[reportAbstractUsage]  (the harness fills these in by inheritance)
            tasks=names,
            task_manager=tasks,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=0,
            numpy_random_seed=0,
        )
    report("lm-eval", len(names), len(names))
    assert results is not None
    rows = []
    for task, metrics in results.get("results", {}).items():
        n = int(metrics.get("sample_len", 0))  # also of groups, which `n-samples` leaves out; those without figures have none
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            low = high = None
            if isinstance(error, int | float) and error > 0:  # 0, where all documents are alike, tells nothing
                low, high = value - 1.96 * error, value + 1.96 * error
            shown = metric if kind == "none" else f"{metric}/{kind}"
            rows.append(MetricRow("comptrust", UTILITY, task, shown, float(value), n, low, high))
    return rows
