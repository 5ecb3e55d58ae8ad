"""The worker: one process, one device, one model held; computes cells and commits them to the record.

A plain class: Ray wraps it in ``sweep/launch.py``, ``comptrust evaluate`` and the tests call it directly.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .calibration import CalibrationConfig, calibrate, overlap
from .cell import Cell, canonical
from .errors import BadInput, CellError
from .evaluate.config import EvaluationConfig
from .record import Record

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

#: Compressions that took longer are cached on disk: a kill later in the cell does not cost them again.
CACHE_FROM_S = 20.0


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs to know beside the cell."""

    record: str
    evaluation: Mapping[str, Any]  # EvaluationConfig as plain data
    threads: int = 1
    cache_gb: float = 50.0
    execution: str = "auto"
    allow_bin: tuple[str, ...] = ()  # models whose .bin weights may be read


class Worker:
    """Long-lived. ``prepare`` loads and compresses, ``evaluate`` measures and commits; ``run`` does both."""

    def __init__(self, config: WorkerConfig, progress: Progress | None = None) -> None:
        import torch

        self.config, self.progress = config, progress or (lambda stage, done, total: None)
        self.record = Record(config.record)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.spread = torch.cuda.device_count() > 1  # a cell with several GPUs: accelerate's device map
        torch.set_num_threads(config.threads)
        self.held: tuple[str, str] | None = None  # (model revision, dtype)
        self.model: Any = None
        self.tokenizer: Any = None
        self.prepared: tuple[str, Any, float] | None = None  # artifact_key, Compressed, seconds
        self._calibrations: dict[str, Any] = {}
        self._references: dict[str, Any] = {}
        self._plan: Any = None
        from .compress.artifacts import ArtifactCache
        from .models import cache_dir

        self.cache = ArtifactCache(cache_dir() / "artifacts", int(config.cache_gb * 1e9))

    # -- the two steps ------------------------------------------------------------------------------------------------

    def run(self, cell: Cell, attempt: int = 1, batch_scale: float = 1.0) -> dict[str, Any]:
        """Both steps; returns the committed (or failed) row of table ``cells``, and its metrics under ``"metrics"``."""
        self.prepare(cell)
        return self.evaluate(cell, attempt, batch_scale)

    def prepare(self, cell: Cell) -> None:
        """Load the model if another is held, compress. Errors are kept for ``evaluate``, which records them."""
        from .cost import PeakMemory

        self.started = datetime.now(UTC)
        self.error: Exception | None = None
        if self.held != (cell.revision, cell.dtype):
            self._drop()
        _free()
        self.peak = PeakMemory(self.device)
        self.peak.start()
        try:
            self._hold(cell)
            self._compress(cell)
        except Exception as e:  # recorded by evaluate()
            _clear_frames(e)
            self.error = e
            self.prepared = None
        _free()

    def evaluate(self, cell: Cell, attempt: int = 1, batch_scale: float = 1.0) -> dict[str, Any]:
        """Measure the prepared cell and commit it. A cell's own error becomes a row of ``failed`` and is returned, not raised."""
        row = cell_row(cell, attempts=attempt, started_at=self.started)
        try:
            if self.error is not None:
                raise self.error
            return self._evaluate(cell, row, batch_scale)
        except Exception as e:
            log.warning("cell %s (%s) failed", cell.key, cell.label, exc_info=not isinstance(e, CellError | BadInput))
            failed = {
                **row,
                "status": "failed",
                "error_type": type(e).__name__,
                "error": str(e)[:2000],
                "finished_at": datetime.now(UTC),
            }
            self.record.fail(failed)
            return failed
        finally:
            self.prepared = None
            _free()

    # -- model and compression ----------------------------------------------------------------------------------------

    def _hold(self, cell: Cell) -> None:
        from . import models

        want = (cell.revision, cell.dtype)
        if self.held == want:
            return
        self.progress("load model", 0, 1)
        device = "auto" if self.spread else self.device
        loaded = models.load(self._found(cell), dtype=cell.dtype, device=device, progress=self.progress)
        self._found(cell)  # it may have been replaced while it was read
        self.model, self.tokenizer = loaded
        self.held = want

    def _found(self, cell: Cell) -> Any:
        """The cell's model, which must be the one that the sweep was planned with."""
        from . import models

        ref = models.resolve(cell.model, allow_bin=cell.model in self.config.allow_bin, commit=cell.revision)
        if ref.revision != cell.revision:
            raise CellError(f"{cell.model} is now {ref.revision}, the sweep was planned with {cell.revision}")
        return ref

    def _drop(self) -> None:
        """Let go of the model and of all that belongs to it."""
        self.model = self.tokenizer = self.prepared = self.held = None
        self._calibrations.clear()
        self._references.clear()

    def _compress(self, cell: Cell) -> None:
        from . import compress
        from .compress import artifacts

        if self.prepared and self.prepared[0] == cell.artifact_key:
            return
        self.prepared = None
        start = time.perf_counter()
        if (found := self.cache.get(cell.artifact_key)) is not None:
            compressed = artifacts.restore(self.model, *found)
            self.prepared = (cell.artifact_key, compressed, compressed.seconds)
            return
        tokens = self._calibration(cell).tokens if cell.calibration else None
        if cell.backend in ("comptrust", "bitsandbytes"):
            device = self.device if self.spread is False else None  # a spread model's blocks are worked on where they are
            compressed = compress.compress(
                self.model, cell.method, dict(cell.params), tokens, device=device, progress=self.progress
            )
        else:
            from .compress import backends

            _free()  # for the library's own process
            compressed = backends.run_backend(
                cell.backend,
                cell.method,
                dict(cell.params),
                ref=self._found(cell),
                dense=self.model,
                tokens=tokens,
                progress=self.progress,
            )
            self._found(cell)
        seconds = time.perf_counter() - start
        if seconds > CACHE_FROM_S and (kept := artifacts.dump(compressed, self.model)) is not None:
            self.progress("cache artefact", 0, 1)
            with contextlib.suppress(OSError):  # a full cache disk costs a repetition after a kill, not the cell
                self.cache.put(cell.artifact_key, *kept)
        self.prepared = (cell.artifact_key, compressed, seconds)

    def _calibration(self, cell: Cell) -> Any:
        found = self._calibrations.get(cell.calibration_digest)
        if found is None:
            self.progress("calibration", 0, 1)
            found = calibrate(CalibrationConfig(**cell.calibration), self.tokenizer)
            if found.digest != cell.calibration_digest:
                raise CellError(
                    f"calibration tokens are now {found.digest}, the sweep was planned with {cell.calibration_digest}"
                )
            self._calibrations[found.digest] = found
        return found

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Any:
        if self._plan is None:
            from .evaluate.data import load_pack
            from .evaluate.run import plan_evaluation

            self._plan = plan_evaluation(EvaluationConfig(**self.config.evaluation), load_pack())
        return self._plan

    def _evaluate(self, cell: Cell, row: dict[str, Any], batch_scale: float) -> dict[str, Any]:
        from .cost import device_name, speed, versions
        from .evaluate.run import evaluate

        if self.plan.digest != cell.evaluation:
            raise CellError(f"evaluation data here has digest {self.plan.digest}, the sweep was planned with {cell.evaluation}")
        assert self.prepared is not None
        _, compressed, compress_s = self.prepared
        start = time.perf_counter()
        dense = cell.method == "dense"
        execution, kernel = self._execution(compressed)
        result = evaluate(
            compressed.model,
            self.tokenizer,
            self.plan,
            reference=None if dense else self._reference(cell),
            dense=dense,
            done=self.record.partials(cell.key),
            on_task=lambda task, rows: self.record.put_partial(cell.key, task, rows),
            progress=self.progress,
            batch_scale=batch_scale,
            beside=() if dense else (self.model,),
        )
        if dense:
            self.record.put_tensors(f"reference/{cell.key}.safetensors", result.reference_out)
        self.progress("speed", 0, 1)
        prefill, decode = speed(compressed.model)
        row |= {
            "status": "done",
            "parameters": compressed.parameters,
            "size_bytes": compressed.size_bytes,
            "bits_per_weight": compressed.bits_per_weight,
            "sparsity_reached": compressed.sparsity_reached,
            "overlap": self._overlap(cell),
            "execution": execution,
            "kernel": kernel,
            "compress_s": compress_s,
            "evaluate_s": time.perf_counter() - start,
            "prefill_tokens_s": prefill,
            "decode_tokens_s": decode,
            "peak_memory_bytes": self.peak.read(),
            "device": device_name(self.device),
            "versions": versions(),
            "finished_at": datetime.now(UTC),
        }
        metrics = [m._asdict() for m in result.metrics]
        self.record.commit(row, metrics, result.items, compressed.layers)
        return {**row, "metrics": metrics}

    def _execution(self, compressed: Any) -> tuple[str, str | None]:
        """Swap our kernels into a pruned cell where the GPU has them; ("kernel", their names) or ("simulated", None)."""
        import torch

        supported = self.device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
        ours = self.config.execution != "simulated" and self.plan.config.engine == "transformers"
        if not ours or compressed.sparsity_reached is None or not supported:
            return "simulated", None
        from ..kernels.modules import swap
        from .compress.export import pack_pruned

        chosen = swap(
            compressed.model, pack_pruned(compressed), backend="triton" if self.config.execution == "kernel" else "auto"
        )
        kernels = sorted(set(chosen.values()) - {"dense"})
        return ("kernel", " ".join(kernels)) if kernels else ("simulated", None)

    def _reference(self, cell: Cell) -> Any:
        """The dense cell's reference outputs, or None while there are none: the dense cell failed, and may be tried again."""
        key = dense_of(cell).key
        if self._references.get(key) is None:
            self._references[key] = self.record.get_tensors(f"reference/{key}.safetensors")
        return self._references[key]

    def _overlap(self, cell: Cell) -> float | None:
        if not cell.calibration:
            return None
        return overlap(self._calibration(cell), self.plan.item_texts(self.tokenizer))


def _free() -> None:
    """Collect garbage and give torch's unused GPU memory back."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _clear_frames(error: BaseException | None) -> None:
    """Forget the local variables of a traceback, which hold models and activations; its text stays."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def dense_of(cell: Cell) -> Cell:
    """The dense cell that ``cell`` is compared with."""
    return cell.model_copy(
        update={"method": "dense", "params": {}, "backend": "comptrust", "calibration": None, "calibration_digest": None}
    )


def _calibration_text(calibration: Mapping[str, Any]) -> str | None:
    """The source; with what else was chosen and has no column of its own (weights, template, system) as JSON."""
    plain = CalibrationConfig().model_dump(mode="json")
    shown = {
        k: v for k, v in calibration.items() if k not in ("samples", "seqlen", "seed") and (k == "source" or v != plain[k])
    }
    source = shown.get("source")
    return source if len(shown) < 2 and isinstance(source, str | None) else canonical(shown)


def cell_row(cell: Cell, **more: Any) -> dict[str, Any]:
    """Identity columns of table ``cells``."""
    p, c = cell.params, cell.calibration or {}
    pattern = p.get("pattern")
    sparsity = p.get("sparsity")
    if pattern and pattern != "unstructured" and sparsity is None:
        n, m = map(int, str(pattern).split(":"))
        sparsity = 1 - n / m
    return {
        "key": cell.key,
        "artifact_key": cell.artifact_key,
        "model": cell.model,
        "revision": cell.revision,
        "method": cell.method,
        "bits": p.get("bits", {"llm_int8": 8, "nf4": 4, "fp4": 4}.get(cell.method)),
        "group_size": p.get("group_size"),
        "sparsity": sparsity,
        "pattern": pattern,
        "params": dict(p),
        "backend": cell.backend,
        "dtype": cell.dtype,
        "calibration": _calibration_text(c),
        "calibration_digest": cell.calibration_digest,
        "samples": c.get("samples"),
        "seqlen": c.get("seqlen"),
        "template": cell.template,
        "seed": c.get("seed"),
        "suite": cell.suite,
        "evaluation": cell.evaluation,
        **more,
    }
