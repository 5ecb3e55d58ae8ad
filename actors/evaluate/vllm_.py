"""vLLM as the engine of answers: another process in an environment of its own, which loads the cell's exported weights.

``VllmGenerator`` answers like ``generate.Generator``. Weights are exported dense in the cell's dtype, quantised ones as the values
that their codes stand for, pruned ones with their zeros: the answers are those of the same weights, in vLLM's arithmetic.
Prompts and answers cross as token ids; end tokens, stop strings and texts are handled here, as ``Generator`` handles them.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ..compress import backends
from ..errors import BadInput, CellError
from .config import EvaluationConfig
from .generate import BATCH, NEAR_TIE, Answer, Generator, Prompt, Stats, _context, _cut, _end_tokens
from .protocol import Decoding

#: Methods whose layers compute with rounded inputs or keep another library's weights: dense weights cannot stand for them.
NOT_EXPORTED = {
    "smoothquant": "it rounds activations as it runs",
    "llm_int8": "bitsandbytes runs its weights",
    "nf4": "bitsandbytes runs its weights",
    "fp4": "bitsandbytes runs its weights",
}
#: Memory for keys and values: bytes on a CPU; on a GPU vLLM takes this share of what is free, weights included.
CPU_KEYS_VALUES, GPU_MEMORY = 2**30, 0.9
#: A runner that was told to end and has not after so many seconds is killed.
PATIENCE_S = 10


def check_engine(config: EvaluationConfig) -> None:
    """``BadInput`` where this engine cannot answer what ``config`` asks, or its environment is absent."""
    if config.engine != "vllm":
        return
    if config.lm_eval:
        raise BadInput(
            f"engine vllm gives no likelihoods, which {config.lm_eval[0]!r} needs",
            where="evaluation.lm_eval",
            fix="Leave evaluation.lm_eval out, or use evaluation.engine transformers",
        )
    if problem := backends.problem("vllm"):
        raise BadInput(
            f"'vllm': its environment is {problem}", where="evaluation.engine", fix="comptrust backends install vllm"
        )


def check_method(config: EvaluationConfig, method: str) -> None:
    """``BadInput`` if cells of ``method`` cannot be exported to vLLM."""
    if config.engine == "vllm" and method in NOT_EXPORTED:
        raise BadInput(
            f"'vllm' cannot load cells of {method}: {NOT_EXPORTED[method]}",
            where="evaluation.engine",
            fix=f"Leave {method} out, or use engine transformers",
        )


class VllmGenerator:
    """Answers of ``model`` by vLLM. The process starts with the first question; use as a context manager, which ends it.

    On a GPU ``model`` and ``beside`` (other modules that hold memory there) wait on the CPU while the process runs. ``seed`` and
    the ids of item and sample key vLLM's own sampling: repeatable, but not the draws of ``Generator``. ``CellError``: vLLM cannot
    load the weights, or its process dies; the end of its log is in the message.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int | None = None, seed: int = 0, beside: Sequence[Any] = ()
    ) -> None:
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise CellError("engine vllm answers on one GPU, and this model is spread over several")
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.device = model.get_input_embeddings().weight.device
        self.away = (model, *beside) if self.device.type == "cuda" else ()
        self.batch_size = batch_size or BATCH["cpu" if self.device.type == "cpu" else "cuda"]
        self.stats = Stats()
        self.limit = _context(model.config.get_text_config())
        self.ends = _end_tokens(model, tokenizer)
        self.progress: Callable[[int], None] = lambda done: None
        self._process: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    _fit, _text = Generator._fit, Generator._text

    def __enter__(self) -> VllmGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()  # the runner ends by itself
            try:
                self._process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        for module in self.away:
            module.to(self.device)

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Answer]:
        """As ``Generator.generate``. ``margin`` is that of greedy answers; infinite where the answer was drawn."""
        if decoding.samples > 1 and decoding.temperature == 0:
            raise ValueError(f"{decoding.samples} samples need a temperature above 0")
        if not prompts:
            return []
        if self._process is None:
            self._start()
        fitted = [self._fit(p.tokens, decoding.max_new_tokens) for p in prompts]
        asked = [
            (p.id, sample, tokens) for p, tokens in zip(prompts, fitted, strict=True) for sample in range(decoding.samples)
        ]
        start = time.perf_counter()
        self._send(
            {
                "prompts": [tokens for *_, tokens in asked],
                "seeds": [_seed(self.seed, item, sample) for item, sample, _ in asked],
                "max_tokens": decoding.max_new_tokens,
                "temperature": decoding.temperature,
                "stop": sorted(self.ends),
            }
        )
        answers: list[Answer | None] = [None] * len(asked)
        for _ in asked:
            made = self._receive()
            i = made["index"]
            answers[i] = self._answer(asked[i][0], made["tokens"], made["gaps"], decoding)
            self.stats.prefill_tokens += len(asked[i][2]) - made["cached"]
            self.stats.reused_tokens += made["cached"]
            self.stats.decode_tokens += len(made["tokens"]) - 1
            self.progress(1)
        self.stats.decode_s += time.perf_counter() - start
        self.stats.near_ties += sum(a.margin < NEAR_TIE for a in answers)  # type: ignore[union-attr]
        return answers  # type: ignore[return-value]

    def _answer(self, item: str, tokens: list[int], gaps: list[float], decoding: Decoding) -> Answer:
        """Up to the end token, the stop string or the last token, whichever is first."""
        kept: list[int] = []
        reason, text, margin = "length", None, float("inf")
        for token, gap in zip(tokens, gaps, strict=True):
            if gap != gap:
                raise CellError(f"the model's logits are NaN (item {item}): its weights are broken")
            if decoding.temperature == 0:
                margin = min(margin, gap)
            if token in self.ends:
                reason = "stop"
                break
            kept.append(token)
            if decoding.stop and (text := _cut(self._text(kept), decoding.stop)) is not None:
                reason = "stop"
                break
        return Answer(self._text(kept) if text is None else text, reason, tuple(kept), margin)

    # -- the process --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="comptrust-vllm-")
        folder = Path(self._folder.name)
        _export(self.model, folder / "model")
        memory: dict[str, Any] = {"kv_cache_memory_bytes": CPU_KEYS_VALUES}
        if self.away:
            for module in self.away:
                module.to("cpu")
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.device)
            memory = {"gpu_memory_utilization": GPU_MEMORY * free / total}
        self._log = folder / "log.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [str(backends.environment("vllm") / "bin" / "python"), "-P", str(_runner())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env=_environment(),
            )
        self._send(
            {
                "model": str(folder / "model"),
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "batch_size": self.batch_size,
                "memory": memory,
            }
        )
        limit = self._receive()["limit"]
        self.limit = min(self.limit or limit, limit)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line.endswith("\n"):  # the runner is dead: its end of the pipe is closed
            raise self._death()
        return json.loads(line)

    def _death(self) -> CellError:
        code = self._process.wait()
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return CellError(f"vLLM's process ended (exit code {code}): " + " | ".join(lines[-5:])[-1500:])


def _runner() -> Path:
    return Path(str(files("comptrust.conf.backends"))) / "vllm.py"


def _environment() -> dict[str, str]:
    return {
        **backends.clean_environment(),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: nothing is left when it dies
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",  # else its sampler is compiled anew in every process, 20 s on a CPU
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


def _export(model: Any, folder: Path) -> None:
    from ..compress.base import Compressed
    from ..compress.export import export

    if getattr(model.config, "quantization_config", None):
        raise CellError("this checkpoint was quantised before: engine vllm is given dense weights, and it has none")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear:
            raise CellError(f"{name} is a {type(module).__name__}: vLLM cannot load these weights")
    export(Compressed(model), None, folder, format="dense")


def _seed(seed: int, item: str, sample: int) -> int:
    """63 bits of SHA-256 of (seed, item, sample)."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{item}\x1f{sample}".encode()).digest()[:8], "big") >> 1
