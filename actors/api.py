"""One model without a sweep: ``compress`` and ``evaluate``, the functions behind the two commands and the public Python names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .cell import Cell
from .errors import BadInput
from .models import default_dtype
from .validation import validate

Progress = Callable[[str, int, int], None]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(dtype: str | None) -> str:
    known = ("float32", "bfloat16", "float16")
    if dtype is not None and dtype not in known:
        raise BadInput(f"unknown dtype {dtype!r}", where="--dtype", fix=f"One of: {', '.join(known)}.")
    return dtype or default_dtype()


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if values is not None and not isinstance(values, Mapping):
        raise BadInput(f"{values!r} is no mapping of names to values", where=where, fix='Give a dict, like {"bits": 4}')
    return dict(values or {})


def _config(schema: Any, values: Mapping[str, Any] | None, where: str) -> Any:
    return validate(schema, _mapping(values, where), where)


def compress(
    model: str | Path,
    method: str,
    params: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    *,
    calibration: Mapping[str, Any] | None = None,
    backend: str = "comptrust",
    format: str = "auto",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress ``model`` and, with ``output``, write a checkpoint that transformers loads, in a ``format`` of docs/export.md.

    ``calibration`` is the block of a sweep; samples and seqlen it leaves out are those of `default_size`.
    Returns ``model`` (the compressed torch module, tensors it shares with the dense one included; in host memory but for
    bitsandbytes' methods and GBLM, which take the model whole on a GPU), ``tokenizer``, ``layers``,
    ``size_bytes``, ``bits_per_weight``, ``sparsity_reached``, ``seconds``, ``calibration_digest``, and ``checkpoint`` (what
    ``export`` says of the folder; None without ``output``). Raises ``BadInput`` for a value no
    method accepts, an impossible combination, a missing model or too little calibration text, before weights are read.
    """
    from . import compress as methods
    from . import models
    from .calibration import CalibrationConfig, calibrate, default_size
    from .compress import backends
    from .compress.export import check_format, check_output

    if output is not None:
        check_output(output)
    model, dtype = str(model), _dtype(dtype)
    params, calibration = _mapping(params, "params"), _mapping(calibration, "calibration")
    source = calibration.get("source", "builtin")
    size = default_size(source) if isinstance(source, str) else {}
    spec = _config(CalibrationConfig, {**size, **calibration}, "calibration")
    if method not in methods.METHODS:
        raise BadInput(f"unknown method {method!r}", where="--method", fix=f"Known: {', '.join(methods.METHODS)}.")
    known = methods.METHODS[method]
    if backend == "bitsandbytes" != known.backend:
        raise BadInput(f"bitsandbytes has no method {method!r}", where="--backend", fix="Leave it out.")
    foreign = backend not in ("comptrust", "bitsandbytes")
    if foreign:
        filled = backends.check(backend, method, params, where=method)
        backends.check_installed(backend)
    else:
        filled = methods.check(method, params, where=method)
    ref = models.resolve(model, where="MODEL")
    shapes = models.load_config(ref)
    reason = backends.incompatible(backend, method, filled, shapes) if foreign else methods.incompatible(method, filled, shapes)
    if reason:
        raise BadInput(reason, where=f"{method} on {model}")
    if output is not None:
        check_format(format, method, filled, shapes, backend)
    tokens = digest = None
    if known.needs_calibration:
        needed = 1 if foreign else methods.required_tokens(method, filled, shapes)
        if (have := spec.samples * spec.seqlen) < needed:
            raise BadInput(
                f"{method} needs {needed} calibration tokens, samples x seqlen gives {have}", where="--samples", fix="Raise it."
            )
        if not foreign:
            methods.check_windows(spec.seqlen, shapes.get_text_config(), where="--seqlen")
        drawn = calibrate(spec, models.load_tokenizer(ref), where="--calibration")
        tokens, digest = drawn.tokens, drawn.digest
    # The blocks of a model in host memory go to the GPU one by one, so it may be larger; bitsandbytes and gradients take it whole.
    whole = not foreign and (known.backend == "bitsandbytes" or (known.prepare and known.needs_calibration))
    dense, tokenizer = models.load(ref, dtype=dtype, device=_device() if whole else "cpu", progress=progress)
    if foreign:
        done = backends.run_backend(backend, method, filled, ref=ref, dense=dense, tokens=tokens, progress=progress)
    else:
        done = methods.compress(dense, method, filled, tokens, device=_device(), progress=progress)
    checkpoint = None
    if output is not None:
        from .compress.export import export

        cell = Cell(
            model=model, revision=ref.revision, method=method, params=filled, dtype=dtype,
            backend=backend if foreign else known.backend, template=models.template_digest(tokenizer),
            calibration=spec.model_dump(mode="json") if digest else None, calibration_digest=digest,
        )  # fmt: skip
        checkpoint = export(done, tokenizer, output, format=format, cell=cell)
    return {
        "model": done.model,
        "tokenizer": tokenizer,
        "layers": done.layers,
        "size_bytes": done.size_bytes,
        "bits_per_weight": done.bits_per_weight,
        "sparsity_reached": done.sparsity_reached,
        "seconds": done.seconds,
        "calibration_digest": digest,
        "checkpoint": checkpoint,
    }


def evaluate(
    model: str | Path,
    evaluation: Mapping[str, Any] | None = None,
    *,
    dense: str | Path | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Metrics of one model: rows of table ``metrics`` without the key, all conventions.

    ``evaluation`` is the block of a sweep (``{"suite": "smoke", "dimensions": ["ethics"]}``). ``dense`` names the uncompressed model: it
    is measured first, its value stands in every row as ``dense``, and divergence from it and flips are measured as in a sweep. Raises
    ``BadInput`` before weights are read.
    """
    from . import models
    from .evaluate.config import EvaluationConfig
    from .evaluate.data import load_pack
    from .evaluate.run import check_answers, check_evaluation, plan_evaluation
    from .evaluate.run import evaluate as run

    config, dtype = _config(EvaluationConfig, evaluation, "evaluation"), _dtype(dtype)
    ref, dense_ref = models.resolve(str(model), where="MODEL"), models.resolve(str(dense), where="--dense") if dense else None
    plan = plan_evaluation(config, load_pack())
    check_evaluation(config, tokenizer := models.load_tokenizer(ref), shapes := models.load_config(ref))
    check_answers(config, shapes, where="MODEL")
    if dense_ref and models.load_tokenizer(dense_ref).get_vocab() != tokenizer.get_vocab():
        raise BadInput(
            f"{model} and {dense} have different vocabularies", where="--dense", fix="Name the model it was made from."
        )

    def measure(ref: models.ModelRef, **options: Any) -> Any:
        loaded, tokenizer = models.load(ref, dtype=dtype, device=_device(), progress=progress)
        return run(loaded, tokenizer, plan, progress=progress, **options)

    if not dense_ref:
        return [m._asdict() for m in measure(ref).metrics]
    original = measure(dense_ref, dense=True)
    identity = lambda m: (m.convention, m.dimension, m.scenario, m.metric)
    values = {identity(m): m.value for m in original.metrics}
    rows = measure(ref, reference=original.reference_out).metrics
    return [{**m._asdict(), "dense": values.get(identity(m))} for m in rows]
