"""One evaluation: the plan (what is asked, and its digest) and its execution on a model.

``plan_evaluation`` needs no model, ``evaluate`` no configuration. Answers are stored as rows of table ``items``; all metrics
come from these rows, so ``rescore`` repeats them without a model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..cell import canonical, digest
from ..errors import BadInput, CellError
from ..record import UTILITY
from . import toxicity_scorer
from .config import EvaluationConfig
from .data import Pack
from .protocol import Decoding, Item, Message, MetricRow, Task
from .suites import select

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
Row = dict[str, Any]
log = logging.getLogger(__name__)

#: Items rendered and tokenised at once; bounds memory in the full suite.
_CHUNK = 2048


@dataclass(frozen=True)
class PlannedTask:
    """The chosen items of one task, each with its decoding."""

    name: str
    task: Task
    items: tuple[Item, ...]
    decodings: tuple[Decoding, ...]

    @property
    def answers(self) -> int:
        return sum(d.samples for d in self.decodings)

    def prompts(self) -> Iterator[tuple[Item, Decoding, str]]:
        """(item, decoding, SHA-256 of its messages), in order."""
        for item, decoding in zip(self.items, self.decodings, strict=True):
            yield item, decoding, _sha(canonical(self.task.messages(item)))


@dataclass(frozen=True)
class EvaluationPlan:
    """What is asked of every cell. Equal digests: the same questions, decoding, text and data."""

    config: EvaluationConfig
    pack_name: str
    pack_digest: str
    tasks: tuple[PlannedTask, ...]
    text_sha: str | None  # of the perplexity text

    @cached_property
    def digest(self) -> str:
        """24 hex digits over pack, suite, item ids, messages, decoding, seed, template, perplexity text and lm-eval tasks."""
        c, h = self.config, hashlib.sha256()
        for task in self.tasks:
            for item, decoding, prompt_sha in task.prompts():
                h.update(canonical([task.name, item.id, prompt_sha, asdict(decoding)]).encode())
        text = None if c.perplexity is None else {**c.perplexity.model_dump(exclude={"source"}), "sha": self.text_sha}
        lm_eval = {"tasks": list(c.lm_eval), "limit": c.lm_eval_limit} if c.lm_eval else None
        return digest(
            {
                "pack": self.pack_digest,
                "suite": c.suite,
                "seed": c.seed,
                "template": c.template,
                "perplexity": text,
                "lm_eval": lm_eval,
                "answers": h.hexdigest(),
                **({} if c.toxicity_scorer == "builtin" else {"toxicity_scorer": c.toxicity_scorer}),
                **({} if c.engine == "transformers" else {"engine": c.engine}),
            }
        )

    @property
    def answers(self) -> int:
        """Answers to generate for one cell."""
        return sum(t.answers for t in self.tasks)

    @property
    def new_tokens(self) -> int:
        """Tokens to generate for one cell, at most."""
        return sum(d.samples * d.max_new_tokens for t in self.tasks for d in t.decodings)

    @property
    def data(self) -> str:
        """Where the questions come from, for people."""
        return "the built-in probes" if self.pack_name == "builtin" else f"pack {self.pack_name}"

    @property
    def notes(self) -> list[str]:
        """What the user may not have meant."""
        if self.pack_name != "builtin" or self.config.suite == "smoke":
            return []
        return [
            f"suite {self.config.suite} asks the built-in probes: set COMPTRUST_DATA=github (or hub) for DecodingTrust's data"
        ]

    def cut_prompts(self, tokenizer: PreTrainedTokenizerBase, model_config: Any) -> list[str]:
        """A line for each task with prompts that the model's context does not hold, told by the longest: they lose their beginning."""
        from .generate import _context
        from .template import encode

        limit, out = _context(model_config.get_text_config()), []
        for name, (messages, decoding) in self._longest.items():
            needed = len(encode(tokenizer, messages, self.config.template)) + decoding.max_new_tokens
            if limit and needed > limit:
                out.append(f"{name}: prompts of up to {needed:,} tokens lose their beginning, the context is {limit:,}")
        return out

    @cached_property
    def _longest(self) -> dict[str, tuple[list[Message], Decoding]]:
        """By task the prompt of most characters."""
        size = lambda asked: sum(len(m.content) for m in asked[0])
        return {
            t.name: max(((t.task.messages(i), d) for i, d in zip(t.items, t.decodings, strict=True)), key=size)
            for t in self.tasks
        }

    def item_texts(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[str]]:
        """What each item shows the model, for the overlap with calibration text: its turns, demonstrations too, without the system
        prompt that many items have in common; and each perplexity window as an item of its own."""
        for task in self.tasks:
            for item in task.items:
                yield [m.content for m in task.task.messages(item) if m.role != "system"]
        if self.config.perplexity is not None:
            from .perplexity import load_windows

            yield from ([text] for text in tokenizer.batch_decode(load_windows(self.config.perplexity, tokenizer)))


@dataclass(frozen=True)
class EvaluationResult:
    items: list[Row]  # rows of table `items` without the key
    metrics: list[MetricRow]
    reference_out: dict[str, torch.Tensor] | None  # what other cells are compared with, if this run had no reference
    stats: dict[str, Any]  # tokens and seconds of the engine, batch size in the end, answers decided by less than 1e-4


def plan_evaluation(config: EvaluationConfig, pack: Pack) -> EvaluationPlan:
    """Choose the items of every task. ``BadInput``: no data for a dimension in the pack, no perplexity text."""
    from . import TASKS

    toxicity_scorer.use(config.toxicity_scorer)
    mmlu = config.mmlu if config.mmlu is not None else config.suite != "smoke" and "mmlu" in pack.names
    tasks = []
    for name in (*config.dimensions, *(["mmlu"] if mmlu else [])):
        task = TASKS[name]
        items = task.items(pack)
        if not items:
            raise BadInput(
                f"the data pack {pack.name!r} has no items for {name}",
                where="evaluation.mmlu" if name == "mmlu" else "evaluation.dimensions",
                fix=f"Leave {name} out, or point COMPTRUST_DATA to a pack that has it",
            )
        chosen = select(items, config.suite, config.per_dimension)
        tasks.append(PlannedTask(name, task, tuple(chosen), tuple(task.decoding(i, config.suite) for i in chosen)))
    text_sha = None
    if config.perplexity is not None:
        from .perplexity import read_source

        text_sha = hashlib.sha256(read_source(config.perplexity.source)).hexdigest()
    return EvaluationPlan(config, pack.name, pack.digest, tuple(tasks), text_sha)


def check_evaluation(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, model_config: Any = None) -> None:
    """``BadInput`` for what the tokenizer can tell (no chat template, a text too short), unknown lm-eval tasks, an absent engine, and
    perplexity windows longer than the context that ``model_config`` tells."""
    from .template import check_template
    from .vllm_ import check_engine

    check_engine(config)
    check_template(tokenizer, config.template)
    if "toxicity" in config.dimensions:
        toxicity_scorer.check(config.toxicity_scorer)
    if config.perplexity is not None:
        from .perplexity import load_windows

        load_windows(config.perplexity, tokenizer)
        context = model_config and getattr(model_config.get_text_config(), "max_position_embeddings", None)
        if context and config.perplexity.seqlen > context:
            raise BadInput(
                f"windows of {config.perplexity.seqlen} tokens do not fit the model's context of {context}",
                where="evaluation.perplexity.seqlen",
                fix=f"Set it to at most {context}",
            )
    if config.lm_eval:
        from .lm_eval import check_tasks

        check_tasks(config.lm_eval)


def check_answers(config: EvaluationConfig, model_config: Any, *, where: str) -> None:
    """``BadInput`` for a model that our engine cannot have answer."""
    from .generate import cannot_answer

    if config.engine == "transformers" and (why := cannot_answer(model_config.get_text_config())):
        raise BadInput(why, where=where, fix="Leave the model out, or let vllm answer (evaluation.engine)")


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    plan: EvaluationPlan,
    *,
    reference: Mapping[str, torch.Tensor] | None = None,
    dense: bool = False,
    done: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    on_task: Callable[[str, list[Row]], None] | None = None,
    progress: Progress | None = None,
    batch_scale: float = 1.0,
    beside: Sequence[Any] = (),
) -> EvaluationResult:
    """Measure ``model``: perplexity and divergence, then every task of the plan.

    Without ``reference`` the result carries one (``reference_out``); with one, divergence and flips are measured against it;
    ``dense`` states them as zero. ``done``: stored rows by task, not computed again if they are complete. ``on_task(name,
    rows)`` is called as a task ends. ``CellError``: NaN logits, or a reference of another plan. Memory running out halves the
    batch. ``beside``: other modules on the GPU, which with ``model`` make room for vLLM while it answers.
    """
    from .divergence import dense_rows, divergence_rows, encode_outcomes, flip_rows

    check_evaluation(plan.config, tokenizer, model.config)
    report = progress or (lambda stage, done, total: None)
    config, metrics, rows = plan.config, [], []
    if config.lm_eval:
        from .lm_eval import evaluate_tasks, load_tasks

        report("lm-eval data", 0, 1)
        lm_eval_tasks = load_tasks(config.lm_eval)  # what cannot be had is told before the work
    out: dict[str, torch.Tensor] = {}
    if config.perplexity is not None:
        scores = _perplexity(model, tokenizer, config, reference, report)
        metrics.append(MetricRow("comptrust", UTILITY, "", "perplexity", scores.perplexity, scores.tokens))
        metrics += divergence_rows(scores.divergence)
        out |= scores.reference
    with _engine(model, tokenizer, config, beside) as generator:
        generator.batch_size = max(1, int(generator.batch_size * batch_scale))
        for task in plan.tasks:
            answered = _stored(task, (done or {}).get(task.name))
            if answered is None:
                answered = _answer(task, generator, config, report)
                if on_task:
                    on_task(task.name, [_public(r, config) for r in answered])
            metrics += task.task.metrics(answered, config.suite)
            rows += answered
    out["outcomes"] = encode_outcomes(rows)
    if dense:
        metrics += dense_rows()
    elif reference is not None:
        metrics += flip_rows(rows, reference["outcomes"])
    if config.lm_eval:
        metrics += evaluate_tasks(generator, lm_eval_tasks, limit=config.lm_eval_limit, progress=report)
    if cut := generator.stats.truncated:
        log.warning(
            "%d prompts were longer than the context of %s tokens and lost their beginning", cut, f"{generator.limit:,}"
        )
    stats = {**asdict(generator.stats), "batch_size": generator.batch_size}
    return EvaluationResult([_public(r, config) for r in rows], metrics, out if reference is None else None, stats)


def _perplexity(model: Any, tokenizer: Any, config: EvaluationConfig, reference: Any, report: Progress) -> Any:
    from ..compress.experts import joined
    from .perplexity import load_windows, score_windows

    assert config.perplexity is not None
    with joined(model):
        return score_windows(
            model,
            load_windows(config.perplexity, tokenizer),
            reference=reference,
            positions=config.perplexity.positions,
            progress=lambda n, total: report("perplexity", n, total),
        )


@contextmanager
def _engine(model: Any, tokenizer: Any, config: EvaluationConfig, beside: Sequence[Any]) -> Iterator[Any]:
    """Gives a ``Generator``, or what answers like one."""
    from ..compress.experts import joined
    from .generate import Generator
    from .vllm_ import VllmGenerator

    if config.engine == "vllm":
        with VllmGenerator(model, tokenizer, batch_size=config.batch_size, seed=config.seed, beside=beside) as generator:
            yield generator
    else:
        with joined(model):
            yield Generator(model, tokenizer, batch_size=config.batch_size, seed=config.seed)


def _answer(task: PlannedTask, generator: Any, config: EvaluationConfig, report: Progress) -> list[Row]:
    """Generate and judge all answers of a task; rows in the order of its items, samples of an item together."""
    from . import judge_many
    from .generate import Prompt
    from .template import encode

    finished = 0

    def tick(n: int) -> None:
        nonlocal finished
        finished += n
        report(task.name, finished, task.answers)

    report(task.name, 0, task.answers)
    generator.progress = tick
    rows: list[Row] = []
    planned = list(task.prompts())
    for start in range(0, len(planned), _CHUNK):
        chunk = planned[start : start + _CHUNK]
        answers: dict[str, list[Any]] = {}
        for decoding in dict.fromkeys(d for _, d, _ in chunk):
            asked = [item for item, d, _ in chunk if d == decoding]
            prompts = [Prompt(i.id, encode(generator.tokenizer, task.task.messages(i), config.template)) for i in asked]
            given = generator.generate(prompts, decoding)
            for k, item in enumerate(asked):
                answers[item.id] = given[k * decoding.samples : (k + 1) * decoding.samples]
        for item, _, prompt_sha in chunk:
            rows += [_row(item, sample, prompt_sha, answer) for sample, answer in enumerate(answers[item.id])]
    judged = judge_many(task.task, *([r[k] for r in rows] for k in ("target", "text", "finish_reason")))
    for row, (outcome, score) in zip(rows, judged, strict=True):
        row["outcome"], row["score"] = str(outcome), score
    return rows


def _row(item: Item, sample: int, prompt_sha: str, answer: Any) -> Row:
    return {
        "dimension": item.dimension,
        "scenario": item.scenario,
        "item": item.id,
        "sample": sample,
        "cluster": item.cluster,
        "prompt_sha": prompt_sha,
        "target": json.loads(json.dumps(item.target)),  # as it comes back from the record, so that rescoring sees the same
        "finish_reason": answer.finish_reason,
        "text": answer.text,
        "text_sha": _sha(answer.text),
    }


def _stored(task: PlannedTask, rows: Sequence[Mapping[str, Any]] | None) -> list[Row] | None:
    """Rows of an earlier run in the plan's order; None if an answer is missing, asked otherwise, or kept as a hash only."""
    if not rows:
        return None
    found = {(r["item"], r["sample"]): r for r in rows}
    out: list[Row] = []
    for item, decoding, prompt_sha in task.prompts():
        for sample in range(decoding.samples):
            row = found.get((item.id, sample))
            if row is None or row["text"] is None or row["prompt_sha"] != prompt_sha:
                return None
            target = json.loads(row["target"]) if isinstance(row["target"], str) else row["target"]
            out.append({**{k: v for k, v in row.items() if k != "key"}, "target": target})
    if len(out) != len(found):
        raise CellError(f"stored answers of {task.name} are of another plan: {len(found)} rows, {len(out)} planned")
    return out


def _public(row: Row, config: EvaluationConfig) -> Row:
    return row if config.keep_text else {**row, "text": None}


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
