"""From a ``SweepConfig`` to its cells: every combination, the dense cell of each model first, impossible ones listed with their reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..actors.calibration import CalibrationConfig
from ..actors.cell import METHODS, Cell, canonical
from ..actors.errors import BadInput
from ..actors.models import default_dtype
from .config import MethodConfig, ModelConfig, SweepConfig, unknown, validate


@dataclass(frozen=True)
class Skip:
    """A combination that cannot be, and why."""

    model: str
    label: str
    reason: str


@dataclass
class Grid:
    """What a sweep comes to. ``plan`` is the evaluation shared by all cells, ``need`` the models by ``held``."""

    cells: list[Cell]
    skipped: list[Skip]
    plan: Any
    need: dict[str, ModelConfig] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)  # rules of ``exclude`` that fitted a cell
    notes: list[str] = field(default_factory=list)  # what may not be meant

    @property
    def keys(self) -> list[str]:
        return [c.key for c in self.cells]


def expand(
    config: SweepConfig, progress: Callable[[str, int, int], None] | None = None, *, installed: bool = True, commit: str = ""
) -> Grid:
    """Resolve models, tokenise calibration sets (cached), list the cells. Loads no weights. ``commit``: what hub models were found at.

    Raises ``BadInput`` for values that no method accepts, missing models, unreadable calibration files, absent data; and for
    ``uninstalled`` environments unless ``installed`` is False: to list cells takes none.
    """
    from ..actors.evaluate.data import load_pack
    from ..actors.evaluate.run import plan_evaluation

    blocks = [checked(block, i) for i, block in enumerate(config.methods)]
    _check_exclude(config)
    _check_engine(config)
    if (absent := uninstalled(config)) and installed:
        raise absent[0]
    plan = plan_evaluation(config.evaluation, load_pack())
    grid = Grid([], [], plan, notes=list(plan.notes))
    for i, model in enumerate(config.models):
        if progress:
            progress("models", i, len(config.models))
        _expand_model(config, i, model, blocks, grid, commit)
    if progress:
        progress("models", len(config.models), len(config.models))
    grid.notes += [f"exclude[{i}] fits no cell: {rule}" for i, rule in enumerate(config.exclude) if i not in grid.used]
    unique: dict[str, Cell] = {}
    again = [c for c in grid.cells if unique.setdefault(c.key, c) is not c]
    if again:
        grid.notes.append(
            f"{len(again)} combinations give a cell that is there already ({again[0].label}): the same parameters once more, or "
            "calibration tokens that no seed changes, as those of a .npy file"
        )
    grid.cells = list(unique.values())
    return grid


def checked(block: MethodConfig, index: int) -> tuple[MethodConfig, list[dict[str, Any]]]:
    """The block with its parameter combinations, each validated against its method; sweeps fail here, before any model is read."""
    from ..actors import compress
    from ..actors.compress import backends

    where = f"methods[{index}]"
    if block.method == "dense":
        for name in block.model_extra or {}:
            raise BadInput(f"dense takes no {name}", where=f"{where}.{name}", fix="Leave it out: dense is the model as it is.")
        return block, [{}]
    if block.backend != "comptrust":
        return block, [backends.check(block.backend, block.method, p, where=where) for p in block.params()]
    known = compress.METHODS[block.method].config.model_fields
    for name in block.model_extra or {}:
        if name not in known:
            fields = [*known, "backend", "calibration"]
            raise BadInput(unknown(name, fields, f"parameter of {block.method}"), where=f"{where}.{name}")
    return block, [compress.check(block.method, p, where=where) for p in block.params()]


def _check_exclude(config: SweepConfig) -> None:
    from ..actors import compress

    known = {"model", "method", "backend", "dtype", "calibration", *CalibrationConfig.model_fields}
    known |= {f for m in compress.METHODS.values() for f in m.config.model_fields}
    for i, rule in enumerate(config.exclude):
        if not rule:
            raise BadInput("an empty rule fits every cell", where=f"exclude[{i}]", fix="Name fields, or leave it out.")
        for name, value in rule.items():
            if name not in known:
                raise BadInput(unknown(name, sorted(known), "field"), where=f"exclude[{i}].{name}")
            for v in value if isinstance(value, list | tuple) else [value]:
                if name == "method" and v not in METHODS:
                    raise BadInput(unknown(v, METHODS, "method"), where=f"exclude[{i}].{name}")


def _check_engine(config: SweepConfig) -> None:
    from ..actors.evaluate.vllm_ import check_method

    for block in config.methods:
        check_method(config.evaluation, block.method)
    if config.evaluation.engine == "vllm" and config.execution == "kernel":
        raise BadInput(
            "'kernel' runs pruned cells in our process, and vllm answers in its own",
            where="execution",
            fix="Leave it at auto, or use evaluation.engine transformers",
        )


def uninstalled(config: SweepConfig) -> list[BadInput]:
    """An error for each environment that the sweep needs, of a backend or of vLLM, and that is not ready here."""
    from ..actors.compress import backends
    from ..actors.evaluate.vllm_ import check_engine

    found = [
        BadInput(
            f"{block.backend!r}: {problem}", where=f"methods[{i}].backend", fix=f"comptrust backends install {block.backend}"
        )
        for i, block in enumerate(config.methods)
        if block.backend != "comptrust" and (problem := backends.problem(block.backend))
    ]
    try:
        check_engine(config.evaluation)
    except BadInput as e:
        if e.where != "evaluation.engine":
            raise
        found.append(e)
    return found


def facts(cell: Cell) -> dict[str, Any]:
    """What a rule of ``exclude`` can name; ``calibration`` is the source, ``template`` that of the calibration."""
    spec = dict(cell.calibration or {})
    named = {"model": cell.model, "dtype": cell.dtype, "method": cell.method, "backend": cell.backend}
    return {**spec, "calibration": spec.get("source"), **cell.params, **named}


def excluded(config: SweepConfig, facts: dict[str, Any]) -> list[int]:
    """Rules of ``exclude`` that the cell of ``facts`` fits."""

    def fits(want: Any, have: Any) -> bool:
        return have in want if isinstance(want, list | tuple) else have == want

    return [i for i, rule in enumerate(config.exclude) if all(fits(v, facts.get(k)) for k, v in rule.items())]


def _expand_model(
    config: SweepConfig,
    index: int,
    model: ModelConfig,
    blocks: list[tuple[MethodConfig, list[dict[str, Any]]]],
    grid: Grid,
    commit: str,
) -> None:
    from ..actors import compress, models
    from ..actors.compress import backends
    from ..actors.evaluate.run import check_answers, check_evaluation

    where = f"models[{index}].id"
    ref = models.resolve(model.id, where=where, allow_bin=model.allow_bin, commit=commit)
    try:
        tokenizer = models.load_tokenizer(ref)
        hf_config = models.load_config(ref)
    except BadInput as e:
        raise BadInput(e.problem, where=where, fix=e.fix) from e
    dtype = model.dtype or default_dtype()
    if unsupported := compress.incompatible("dense", {}, hf_config):
        raise BadInput(unsupported, where=where)
    evaluation = config.evaluation.model_copy(update={"engine": "transformers"})  # ``uninstalled`` saw to vLLM
    check_evaluation(evaluation, tokenizer, hf_config)
    check_answers(config.evaluation, hf_config, where=where)
    grid.notes += [f"{model.id}: {cut}" for cut in grid.plan.cut_prompts(tokenizer, hf_config)]
    base = {
        "model": model.id,
        "revision": ref.revision,
        "dtype": dtype,
        "template": models.template_digest(tokenizer),
        "suite": config.evaluation.suite,
        "evaluation": grid.plan.digest,
    }
    dense = Cell(**base, method="dense")
    if twin := next((c for c in grid.cells if c.key == dense.key), None):
        raise BadInput(f"{model.id!r} in {dtype} is {twin.model!r} again", where=where, fix="Name a model once in each dtype.")
    digests: dict[str, str] = {}
    grid.need[held(dense)] = model
    grid.cells.append(dense)
    for i, (block, combinations) in enumerate(blocks):
        if block.method == "dense":
            continue
        known = compress.METHODS[block.method]
        foreign = block.backend != "comptrust"
        backend = block.backend if foreign else known.backend
        calibrations = _with_digests(config.calibrations(i), ref, digests) if known.needs_calibration else [(None, None, "")]
        for params in combinations:
            if foreign:
                reason, needed = backends.incompatible(backend, block.method, params, hf_config), 0
            else:
                reason = compress.incompatible(block.method, params, hf_config)
                needed = 0 if reason else compress.required_tokens(block.method, params, hf_config)
            for spec, digest, at in calibrations:
                cell = Cell(
                    **base, method=block.method, params=params, backend=backend, calibration=spec, calibration_digest=digest
                )
                if fits := excluded(config, facts(cell)):
                    grid.used.update(fits)
                    continue
                if reason:
                    grid.skipped.append(Skip(model.id, cell.label, reason))
                    break
                if spec:
                    _enough(spec, needed, cell.label, at)
                if spec and not foreign:
                    try:
                        compress.check_windows(spec["seqlen"], hf_config.get_text_config(), where=f"{at}.seqlen")
                    except BadInput as e:  # a model beside others with a longer context
                        grid.skipped.append(Skip(model.id, cell.label, str(e)))
                        continue
                grid.cells.append(cell)


def _enough(calibration: dict[str, Any], needed: int, label: str, where: str) -> None:
    have = calibration["samples"] * calibration["seqlen"]
    if have < needed:
        raise BadInput(
            f"{label} needs {needed} calibration tokens, samples x seqlen gives {have}",
            where=f"{where}.samples",
            fix=f"Raise samples to {-(-needed // calibration['seqlen'])} or more.",
        )


def _with_digests(
    calibrations: list[tuple[CalibrationConfig, str]], ref: Any, digests: dict[str, str]
) -> list[tuple[dict[str, Any], str, str]]:
    """Each calibration as plain data, the digest of its tokens, and where it is written. ``digests``: those of the model so far."""
    from ..actors.calibration import calibration_digest

    out = []
    for c, at in calibrations:
        spec = c.model_dump(mode="json")
        if (
            key := canonical(spec)
        ) not in digests:  # methods share one, and a data set without a commit is read for each digest
            digests[key] = calibration_digest(c, ref, where=at)
        out.append((spec, digests[key], at))
    return out


def held(cell: Cell) -> str:
    """What a worker on ``cell`` holds: its model in its dtype. All cells of a sweep that share it share one dense cell."""
    return f"{cell.model} {cell.dtype}"


def order(cells: list[Cell], workers: int) -> list[Cell]:
    """Launch order: dense first, then longest methods first, models interleaved ``workers`` wide so that each worker keeps one model."""
    longest = ("gptq", "sparsegpt", "awq", "gblm", "smoothquant", "wanda", "llm_int8", "nf4", "fp4", "magnitude", "rtn")
    rank = {m: i for i, m in enumerate(longest)}
    by_model: dict[str, list[Cell]] = {}
    for c in cells:
        by_model.setdefault(held(c), []).append(c)
    queues = [
        sorted(q, key=lambda c: (c.method != "dense", rank.get(c.method, 0), canonical(dict(c.params))))
        for q in by_model.values()
    ]
    out: list[Cell] = []
    active, rest = queues[: max(workers, 1)], queues[max(workers, 1) :]
    while active:
        for q in list(active):
            out.append(q.pop(0))
            if not q:
                active.remove(q)
                if rest:
                    active.append(rest.pop(0))
    return out


def config_of(sweep: dict[str, Any]) -> SweepConfig:
    """The configuration stored in ``sweeps/<id>.json``."""
    return validate(SweepConfig, sweep["config"])
