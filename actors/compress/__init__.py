"""Compression: every method behind one call. Imports with torch alone (no Ray, no transformers)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..errors import BadInput
from . import awq, bitsandbytes_, engine, gblm, gptq, magnitude, rtn, smoothquant, sparsegpt, wanda
from .base import Compressed, MethodConfig, MethodSpec, Progress, StoredLinear
from .engine import check_windows
from .experts import all_tokens, mixtures, split_experts
from .structure import decoder_blocks, discover, linears_of, named_linears, record, signature

__all__ = [
    "METHODS",
    "Compressed",
    "MethodSpec",
    "StoredLinear",
    "check",
    "check_windows",
    "compress",
    "compress_many",
    "incompatible",
    "required_tokens",
]


class DenseConfig(MethodConfig):
    """The model as it is."""


def _as_many_as_inputs(config: MethodConfig, inputs: int) -> int:
    return inputs  # a Hessian of fewer tokens than inputs has no inverse but by damping


METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        MethodSpec("dense", DenseConfig),
        MethodSpec("rtn", rtn.RtnConfig, solve=rtn.solve),
        MethodSpec(
            "gptq", gptq.GptqConfig, True, solve=gptq.solve, statistics=lambda c: {"gram"}, min_tokens=_as_many_as_inputs,
        ),
        MethodSpec("awq", awq.AwqConfig, True, solve=awq.solve, statistics=lambda c: {"gram", "mean_abs"}, folds=True),
        MethodSpec(
            "smoothquant", smoothquant.SmoothQuantConfig, True, solve=smoothquant.solve, statistics=lambda c: {"max_abs"},
            folds=True, replace=smoothquant.replace, format="w8a8",
        ),
        MethodSpec("llm_int8", bitsandbytes_.LlmInt8Config, backend="bitsandbytes", replace=bitsandbytes_.int8),
        MethodSpec("nf4", bitsandbytes_.FourBitConfig, backend="bitsandbytes", replace=bitsandbytes_.nf4),
        MethodSpec("fp4", bitsandbytes_.FourBitConfig, backend="bitsandbytes", replace=bitsandbytes_.fp4),
        MethodSpec("magnitude", magnitude.MagnitudeConfig, solve=magnitude.solve, prepare=magnitude.prepare),
        MethodSpec("wanda", wanda.WandaConfig, True, solve=wanda.solve, statistics=lambda c: {"norm"}),
        MethodSpec(
            "sparsegpt", sparsegpt.SparseGptConfig, True, solve=sparsegpt.solve, statistics=lambda c: {"gram"},
            min_tokens=_as_many_as_inputs,
        ),
        MethodSpec("gblm", gblm.GblmConfig, True, solve=gblm.solve, statistics=lambda c: {"norm"}, prepare=gblm.prepare),
    )
}  # fmt: skip


def _config(method: str, params: Mapping[str, Any], where: str) -> tuple[MethodSpec, MethodConfig]:
    if method not in METHODS:
        raise BadInput(
            f"unknown method {method!r}", where=f"{where}.method" if where else "method", fix=f"One of: {', '.join(METHODS)}"
        )
    spec = METHODS[method]
    try:
        return spec, spec.config.model_validate(dict(params))
    except ValidationError as e:
        first = e.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        at = ".".join(p for p in (where, path) if p)
        if first["type"] == "extra_forbidden":
            fields = sorted(spec.config.model_fields)
            raise BadInput(
                f"{method} has no parameter {path!r}", where=at, fix=f"It takes: {', '.join(fields) or 'none'}"
            ) from None
        value = first["input"]
        shown = f"{value!r}: " if not isinstance(value, Mapping) else ""
        raise BadInput(
            f"{shown}{first['msg'].removeprefix('Value error, ')}", where=at, fix=f"See the {method} page of the docs"
        ) from None


def check(method: str, params: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """``params`` with every default filled in, JSON values only. BadInput for unknown names and values no model accepts."""
    return _config(method, params, where)[1].model_dump(mode="json")


def incompatible(method: str, params: Mapping[str, Any], model_config: Any) -> str | None:
    """Why these (valid) parameters cannot work together or on this model, or None. Reads no weights.

    ``model_config`` is the model's transformers config, or that as a dict; None checks the parameters alone.
    """
    spec, config = _config(method, params, "")
    if why := config.impossible():
        return why
    if model_config is None:
        return None
    shapes = _canonical(model_config)
    if method != "dense" and (library := _quantised_by(shapes)):
        return f"the model is quantised already ({library}): give the dense one it was made from"
    try:
        linears = _linears(shapes)
    except BadInput as e:
        return str(BadInput(e.problem, fix=e.fix))
    if why := config.unfit(linears):
        return why
    if method == "llm_int8" and (deep := config.compressed(_beyond_three(shapes))):
        name = next(iter(deep))
        rest = f"which bitsandbytes' LLM.int8 does not take (skip: ['*.{name.rpartition('.')[2]}'] leaves it dense)"
        return f"{name} has inputs of more than three dimensions, {rest}"
    return _cannot_stream(shapes) if spec.needs_calibration else None


def is_mixture(model_config: Any) -> bool:
    """Whether the model has experts to choose from. Reads no weights."""
    return _is_mixture(_canonical(model_config))


def required_tokens(method: str, params: Mapping[str, Any], model_config: Any) -> int:
    """Calibration tokens (samples x seqlen) this method needs at least on this model; 0 if it needs none. Reads no weights."""
    spec, config = _config(method, params, "")
    return spec.least_tokens(config, _linears(_canonical(model_config))) if spec.needs_calibration else 0


def compress(
    model: nn.Module,
    method: str,
    params: Mapping[str, Any] | None = None,
    tokens: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """A compressed copy of ``model`` (a transformers causal LM), which is not changed; untouched tensors are shared.

    ``tokens`` int64 [samples, seqlen], for methods with calibration. ``device``: where blocks are worked on, one at a time (the
    model's own by default; results return to where the model is). ``progress(stage, done, total)`` is called block by block.
    Raises BadInput for what cannot work and CellError for what failed on the way (non-finite activations, singular Hessian).
    """
    return compress_many(model, [(method, params or {})], tokens, device=device, progress=progress)[0]


def compress_many(
    model: nn.Module,
    cells: Sequence[tuple[str, Mapping[str, Any]]],
    tokens: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    chunk_tokens: int | None = None,
) -> list[Compressed]:
    """`compress` for several (method, params) of one model in one pass over its blocks; each result is what `compress` gives.

    Shared: a block's trip to the device, the embedding pass, the first group's statistics. ``chunk_tokens``: calibration tokens
    whose activations are held at once (chosen by memory if None).
    """
    configs = []
    for method, params in cells:
        spec, config = _config(method, params, "")
        if why := config.impossible():
            raise BadInput(f"{method}: {why}", where="params")
        configs.append((spec, config))
    if device is not None:
        device = torch.empty(0, device=device).device  # 'cuda' and 'cuda:0' are one device
    return engine.run(model, configs, tokens, device=device, progress=progress, chunk_tokens=chunk_tokens)


def _canonical(model_config: Any) -> str:
    values = dict(model_config) if isinstance(model_config, Mapping) else model_config.to_dict()
    return json.dumps(values, sort_keys=True, default=str)


def _quantised_by(config_json: str) -> str | None:
    """Whose format the weights are in; None if they load as dense ones."""
    found = json.loads(config_json).get("quantization_config")
    return None if not found or found.get("dequantize") else found.get("quant_method", "in a format without a name")


@functools.lru_cache(maxsize=32)
def _linears(config_json: str) -> Mapping[str, int]:
    """Name -> inputs of every linear that would be compressed, from a model without weights."""
    try:
        with torch.device("meta"):
            model = _without_weights(config_json)
    except Exception as e:  # whatever transformers makes of a value that it does not know
        raise BadInput(
            f"transformers cannot make a model of this config ({type(e).__name__}: {e})", fix="Correct the model's config.json."
        ) from e
    prefix, blocks = decoder_blocks(model)
    return {name: m.in_features for name, m in named_linears(prefix, blocks).items()}


@functools.lru_cache(maxsize=32)
def _is_mixture(config_json: str) -> bool:
    with torch.device("meta"):
        return bool(mixtures(_without_weights(config_json)))


@functools.lru_cache(maxsize=32)
def _cannot_stream(config_json: str) -> str | None:
    """Why the engine cannot call a model's blocks one by one, from a run on tensors that have a shape and no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            model = _without_weights(config_json).eval()
            discover(model, decoder_blocks(model)[1], torch.zeros(1, 8, dtype=torch.int64), folds=False)
    except BadInput as e:
        return str(BadInput(e.problem, fix=e.fix))
    except Exception:  # something asks for numbers, as in making Gemma 3 with its vision tower: the run will tell
        return None
    return None


@functools.lru_cache(maxsize=32)
def _beyond_three(config_json: str) -> tuple[str, ...]:
    """Linears whose inputs have more than three dimensions (MLA's kv_b_proj); none where the model does not run without numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen: set[tuple] = set()
    deep: set[str] = set()

    def visit(block: nn.Module, forward: Callable, hidden: Tensor, kwargs: dict) -> None:
        if signature(block) not in seen:
            seen.add(signature(block))
            for name, linear in linears_of(block).items():
                linear.register_forward_pre_hook(lambda _, args, name=name: deep.add(name) if args[0].ndim > 3 else None)
            with all_tokens(block):
                forward(hidden, **kwargs)

    try:
        with FakeTensorMode():
            model = _without_weights(config_json).eval()
            prefix, blocks = decoder_blocks(model)
            record(model, blocks, torch.zeros(1, 8, dtype=torch.int64), visit)
    except Exception:  # blocks that are called otherwise, and as above
        return ()
    return tuple(n for n in named_linears(prefix, blocks) if n.removeprefix(f"{prefix}.").partition(".")[2] in deep)


def _without_weights(config_json: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads(config_json)
    values.pop("quantization_config", None)
    values.pop("dtype", None)
    return split_experts(AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)))
