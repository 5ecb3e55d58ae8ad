"""``SweepConfig``: a sweep is one reviewable YAML file. Lists are axes of the grid; everything else is one value.

Bad values become one ``BadInput`` with the YAML path and the fix; impossible combinations inside a grid are skipped by ``grid.expand``.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ..actors.calibration import CalibrationConfig
from ..actors.cell import METHODS
from ..actors.errors import BadInput
from ..actors.evaluate.config import EvaluationConfig
from ..actors.validation import unknown, validate

Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=8)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
some = Field(min_length=1)  # an axis without values would leave no cell that calibrates


def _whole(gpus: float | None) -> float | None:
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g} GPUs: above one Ray gives whole GPUs only")
    return gpus


Gpus = Annotated[float | None, AfterValidator(_whole)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Frozen):
    """A model of the grid. In YAML a plain string is its ``id``."""

    id: str = Field(description="hub id (org/name@revision), directory, or package:NAME")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None,
        description="dtype of weights and arithmetic; default: bfloat16 if the machine that starts the sweep has a GPU, else float32",
    )
    allow_bin: bool = Field(default=False, description="read pytorch_model*.bin (weights only) where there are no safetensors")
    gpus: Gpus = Field(default=None, ge=0, description="GPUs per cell of this model; default: resources.gpus")
    memory_gb: float | None = Field(default=None, gt=0, description="host memory per cell, GB; default: resources.memory_gb")


class CalibrationAxes(CalibrationConfig):
    """Calibration of the sweep; ``samples``, ``seqlen``, ``seed`` and ``template`` may be lists, and are then axes."""

    samples: Count | Annotated[list[Count], some] = Field(default=128, description="calibration sequences")  # type: ignore[assignment]
    seqlen: Length | Annotated[list[Length], some] = Field(default=2048, description="tokens a sequence")  # type: ignore[assignment]
    seed: Seed | Annotated[list[Seed], some] = Field(default=0, description="seed that draws the windows")  # type: ignore[assignment]
    template: bool | Annotated[list[bool], some] = Field(default=False, description="wrap texts in the chat template")  # type: ignore[assignment]

    def expand(self) -> list[CalibrationConfig]:
        """One ``CalibrationConfig`` for each combination of the axes."""
        blocks = product(self.model_dump(), ("samples", "seqlen", "seed", "template"))
        return [validate(CalibrationConfig, b, "calibration") for b in blocks]


#: One block, or a list of blocks: for sources, mixture weights and system prompts, whose lists would be ambiguous.
Calibrations = CalibrationAxes | Annotated[list[CalibrationAxes], Field(min_length=1)]


class MethodConfig(BaseModel):
    """A block of the grid: one method and its parameters, each a value or a list. Blocks are ragged: each has its own parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")

    method: str = Field(description="one of: " + " ".join(METHODS))
    backend: Literal["comptrust", "autoawq", "auto-gptq", "gptqmodel", "llmcompressor"] = "comptrust"
    calibration: Calibrations | None = Field(default=None, description="instead of the sweep's calibration, for this block")

    @field_validator("backend", mode="before")
    @classmethod
    def _no_engine(cls, v: Any) -> Any:
        if v == "vllm":
            raise ValueError("'vllm' answers, it does not compress: write evaluation: {engine: vllm}")
        return v

    @field_validator("method")
    @classmethod
    def _known(cls, v: str) -> str:
        if v not in METHODS:
            raise ValueError(unknown(v, METHODS, "method"))
        return v

    @model_validator(mode="after")
    def _axes_hold_values(self) -> MethodConfig:
        if empty := [k for k, v in (self.model_extra or {}).items() if v == [] and k != "skip"]:
            raise ValueError(f"{empty[0]} is an empty list, which leaves no cell: give values, or leave it out")
        return self

    def params(self) -> list[dict[str, Any]]:
        """Each combination of the block's parameters, defaults not yet filled in."""
        extra = dict(self.model_extra or {})
        skip = extra.get("skip")
        if isinstance(skip, list) and not any(isinstance(globs, list) for globs in skip):
            extra["skip"] = [skip]  # a list of globs is one value, only a list of lists is an axis
        return product(extra, tuple(extra))


class Resources(_Frozen):
    """What one cell takes, and how often it may be tried."""

    gpus: Gpus = Field(
        default=None, ge=0, description="GPUs per cell (0.5: two cells share one); default 1 if the cluster has any, else 0"
    )
    cpus: int = Field(default=1, ge=1, description="CPU threads per cell")
    memory_gb: float | None = Field(default=None, gt=0, description="host memory reserved per cell, GB")
    workers: int | None = Field(default=None, ge=1, description="at most so many cells at once; default: as many as fit")
    timeout_s: float | None = Field(default=None, gt=0, description="a cell that runs longer fails, seconds")
    attempts: int = Field(
        default=3, ge=1, le=20, description="tries of a cell whose worker or node dies; a cell's own error is final"
    )
    max_failures: int = Field(default=1_000_000, ge=1, description="stop the sweep after so many failed cells")
    cache_gb: float = Field(default=50, ge=0, description="disk budget of cached compressed artefacts per node, GB; 0: none")


class WandbConfig(_Frozen):
    """The live view. Keys come from the environment (WANDB_API_KEY) or netrc only."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = Field(
        default_factory=lambda: os.environ.get("WANDB_PROJECT") or "comptrust",
        description="default: WANDB_PROJECT of the environment, or comptrust",
    )
    entity: str | None = Field(
        default_factory=lambda: os.environ.get("WANDB_ENTITY") or None,
        description="default: WANDB_ENTITY of the environment, or the key's own",
    )
    items: bool = Field(default=False, description="upload item texts (prompts and answers) as tables")
    init_timeout_s: float = Field(default=20, gt=0)
    finish_timeout_s: float = Field(default=60, gt=0)


class SweepConfig(_Frozen):
    """A whole sweep. ``comptrust plan`` shows what it comes to."""

    name: str = Field(default="sweep", pattern=r"^[A-Za-z0-9._-]+$", max_length=64)
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    methods: tuple[MethodConfig, ...] = Field(
        default=(), description="blocks of the grid; the dense cell of each model is always added"
    )
    exclude: tuple[dict[str, Any], ...] = Field(
        default=(), description="cells to leave out: all given fields must match, lists mean any of"
    )
    calibration: Calibrations = Field(default_factory=CalibrationAxes, description="a block, or a list of blocks as an axis")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    resources: Resources = Field(default_factory=Resources)
    absent: tuple[str, ...] = Field(
        default=(), description="measurements of a reproduced study that this sweep does not make; `plan` lists them"
    )
    results: str = Field(default="", description="folder, s3://... or gs://...; default: results/<name>")
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    execution: Literal["auto", "kernel", "simulated"] = Field(
        default="auto", description="evaluate pruned cells through our kernels (auto: on a supported GPU)"
    )

    @field_validator("models", mode="before")
    @classmethod
    def _strings(cls, v: Any) -> Any:
        return [{"id": m} if isinstance(m, str) else m for m in v] if isinstance(v, list | tuple) else v

    def calibrations(self, index: int) -> list[tuple[CalibrationConfig, str]]:
        """The calibrations of a method block, its own or the sweep's: every combination of every block, and where it is written."""
        own = self.methods[index].calibration
        given, where = (own, f"methods[{index}].calibration") if own else (self.calibration, "calibration")
        if not isinstance(given, list):
            return [(c, where) for c in given.expand()]
        return [(c, f"{where}[{n}]") for n, axes in enumerate(given) for c in axes.expand()]

    @model_validator(mode="after")
    def _defaults(self) -> SweepConfig:
        if not self.results:
            object.__setattr__(self, "results", f"results/{self.name}")
        return self


def product(block: dict[str, Any], axes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Cartesian product over the ``axes`` of ``block`` that are lists, in the order written (last axis fastest)."""
    out: list[dict[str, Any]] = [{}]
    for name, value in block.items():
        values = value if name in axes and isinstance(value, list | tuple) else [value]
        out = [{**o, name: v} for o in out for v in values]
    return out


# -- reading ----------------------------------------------------------------------------------------------------------


def parse_yaml(text: str, where: str) -> Any:
    """YAML 1.2 (so ``2:4`` is text, ``1e-5`` a number, duplicate keys an error) as plain Python."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError as e:
        raise BadInput("nested too deeply", where=where) from e
    except YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise BadInput(f"not valid YAML: {getattr(e, 'problem', None) or e}", where=f"{where}{line}") from e


def shipped() -> list[str]:
    """Names of the sweeps that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files("comptrust.conf").iterdir() if p.name.endswith(".yaml"))


def load_config(sweep: str | Path | dict[str, Any], overrides: tuple[str, ...] | list[str] = ()) -> SweepConfig:
    """``SWEEP`` (a YAML file, a shipped name, or a mapping) with ``a.b=c`` overrides applied."""
    if isinstance(sweep, dict):
        data, where = _plain(sweep, "sweep", default=os.fspath), "sweep"
    else:
        path = Path(sweep)
        if path.is_file():
            text, where = _read(path), str(sweep)
        elif str(sweep) in shipped():
            text, where = (resources.files("comptrust.conf") / f"{sweep}.yaml").read_text(), str(sweep)
        else:
            names = shipped()
            near = difflib.get_close_matches(str(sweep), names, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise BadInput(
                f"no sweep {str(sweep)!r}", where="SWEEP", fix=f"{hint}Give a YAML file or one of: {', '.join(names)}."
            )
        _plain(data := parse_yaml(text, where), where, default=str)
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"a sweep is a mapping, this is {type(data).__name__}"
        raise BadInput(what, where=where, fix="Write `models: [MODEL]` and `methods: [{method: rtn, bits: 4}]` to begin with.")
    for text in overrides:
        override(data, text)
    return validate(SweepConfig, data)


def _plain(data: Any, where: str, default: Callable[[Any], str]) -> Any:
    """A copy as JSON has it; ``default``: text of what JSON does not know."""
    try:
        return json.loads(json.dumps(data, default=default, skipkeys=True))
    except (TypeError, ValueError, RecursionError) as e:
        raise BadInput(f"no plain data: {e}", where=where, fix="Give text, numbers, lists and mappings.") from e


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read: {e}", where=str(path), fix="Give a UTF-8 YAML file that you may read.") from e


def override(data: dict[str, Any], text: str, example: str = "evaluation.suite=standard") -> None:
    """Set one value of ``data`` by ``a.b=c``; c is YAML. BadInput for another form or a path that is none."""
    path, eq, value = text.partition("=")
    if not eq or not path:
        raise BadInput(f"{text!r} is no override", where="--set", fix=f"Write --set a.b=c, for example --set {example}.")
    node: Any = data
    *parents, last = path.split(".")
    for i, name in enumerate(parents):
        node = _child(node, name, ".".join(parents[: i + 1]))
    parsed = parse_yaml(value, f"--set {path}")
    if isinstance(node, list):
        node[_index(node, last, path)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise BadInput(f"{'.'.join(parents)} is {node!r}, no mapping", where=f"--set {path}", fix="Name a field of a mapping.")


def _child(node: Any, name: str, path: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, name, path)]
    if not isinstance(node, dict):
        raise BadInput(f"{node!r} is no mapping", where=f"--set {path}", fix="Name a field of a mapping.")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _index(node: list[Any], name: str, path: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise BadInput(f"{name!r} is no index of a list of {len(node)}", where=f"--set {path}", fix="Count from 0.")
    return int(name)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a sweep file, for editors (``conf/sweep.schema.json``)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **SweepConfig.model_json_schema()}
