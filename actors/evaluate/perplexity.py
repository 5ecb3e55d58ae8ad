"""Perplexity and the divergence from dense, in one pass over fixed windows of text.

Perplexity = exp(mean negative log-likelihood of the predicted tokens), windows of equal length, no overlap, no start token:
with 512 tokens a window, 511 are predicted. Legend: W windows, L tokens a window, K positions, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import BadInput, CellError
from .config import PerplexityConfig
from .divergence import Divergence, Reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Positions whose log-softmax is in memory at once.
_CHUNK = 128


@dataclass
class WindowScores:
    nll: float = 0.0  # sum over predicted tokens, nats
    tokens: int = 0
    divergence: Divergence = field(default_factory=Divergence)
    reference: dict[str, torch.Tensor] = field(default_factory=dict)  # what the dense cell stores

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / self.tokens, 700.0))  # beyond that a float overflows


def read_source(source: str) -> bytes:
    """The bytes that define the text, for its digest. ``BadInput`` if there is no such file."""
    if source == "builtin":
        return (files("comptrust.actors.data") / "perplexity.txt").read_bytes()
    path = Path(source).expanduser()
    if path.suffix not in (".txt", ".jsonl", ".npy"):
        raise BadInput(
            f"unknown kind of text {source!r}",
            where="evaluation.perplexity.source",
            fix="Give `builtin`, or a .txt, .jsonl or .npy file",
        )
    try:
        return path.read_bytes()
    except OSError as e:
        raise BadInput(
            f"cannot read {source!r}: {e.strerror}",
            where="evaluation.perplexity.source",
            fix="Give `builtin` or a readable file",
        ) from e


def load_windows(config: PerplexityConfig, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """int64 [W, L]: the first ``windows`` windows of the source. ``BadInput`` if it is too short or not what its name says."""
    data = read_source(config.source)
    if config.source.endswith(".npy"):
        ids = _npy(config.source)
        if ids.shape[1] < config.seqlen:
            raise BadInput(
                f"{config.source} has rows of {ids.shape[1]} tokens, seqlen is {config.seqlen}",
                where="evaluation.perplexity.seqlen",
            )
        if ids.min() < 0 or ids.max() >= len(tokenizer):
            raise BadInput(
                f"{config.source} has token ids {ids.min()}..{ids.max()}, the tokenizer has {len(tokenizer)}",
                where="evaluation.perplexity.source",
                fix="Use ids made with the model's own tokenizer, or give text",
            )
        windows = ids[:, : config.seqlen]
    else:
        tokens = tokenizer(_text(config.source, data), add_special_tokens=False, verbose=False).input_ids
        whole = len(tokens) // config.seqlen * config.seqlen
        windows = np.asarray(tokens[:whole], dtype=np.int64).reshape(-1, config.seqlen)
    if len(windows) < config.windows:
        raise BadInput(
            f"{config.source} has {len(windows)} windows of {config.seqlen} tokens, {config.windows} are asked for",
            where="evaluation.perplexity.windows",
            fix="Ask for fewer or shorter windows, or give a longer text",
        )
    return torch.from_numpy(np.ascontiguousarray(windows[: config.windows], dtype=np.int64))


def _npy(source: str) -> np.ndarray:
    try:
        with Path(source).expanduser().open("rb") as file:  # np.load would take an archive, too
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise BadInput(
            f"cannot read {source!r}: {e}",
            where="evaluation.perplexity.source",
            fix="Save int64 [windows, seqlen] by numpy.save",
        ) from e
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise BadInput(
            f"{source} holds {ids.dtype} {list(ids.shape)}, not int64 [windows, seqlen]", where="evaluation.perplexity.source"
        )
    return ids


def _text(source: str, data: bytes) -> str:
    at, texts = "", []
    try:
        text = data.decode("utf-8")
        if not source.endswith(".jsonl"):
            return text
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                at = f", line {number}"
                texts.append(json.loads(line)["text"])
                texts[-1].encode("utf-8")  # an escape may be half a character, which no tokenizer takes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BadInput(
            f"cannot read {source!r}{at}: {type(e).__name__}: {e}",
            where="evaluation.perplexity.source",
            fix='Give UTF-8 text, or one {"text": ...} a line for .jsonl',
        ) from e
    return "\n\n".join(texts)


@torch.inference_mode()
def score_windows(
    model: Any,
    windows_WL: torch.Tensor,
    *,
    reference: Mapping[str, torch.Tensor] | None = None,
    positions: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> WindowScores:
    """Log-likelihood of the windows, and over the first ``positions`` predictions the divergence from ``reference``.

    Without a reference the scores carry one (``scores.reference``, about 2 bytes x V x positions). NaN logits, and a
    reference made of other windows, are a ``CellError``.
    """
    device = model.get_input_embeddings().weight.device
    dense = None if reference is None else Reference.read(reference, windows_WL, positions)
    scores, kept = WindowScores(), None
    for w, window_L in enumerate(windows_WL):
        logits_KV = model(input_ids=window_L[None].to(device), use_cache=False).logits[0, :-1]
        for start in range(0, len(logits_KV), _CHUNK):
            logprob_KV = logits_KV[start : start + _CHUNK].float().log_softmax(-1)
            targets_K = window_L[start + 1 : start + 1 + len(logprob_KV)].to(logprob_KV.device)
            room = max(0, positions - scores.tokens)
            scores.nll -= float(logprob_KV.gather(1, targets_K[:, None]).double().sum())
            if dense is not None:
                scores.divergence.add(dense, scores.tokens, logprob_KV[:room])
            else:
                if kept is None:
                    kept = Reference.empty(min(positions, windows_WL[:, 1:].numel()), logprob_KV.shape[1])
                kept.put(scores.tokens, logprob_KV[:room])
            scores.tokens += len(logprob_KV)
        if math.isnan(scores.nll):
            raise CellError(f"the loss is NaN in window {w}: the model's weights are broken")
        if progress:
            progress(w + 1, len(windows_WL))
    if kept is not None:
        scores.reference = kept.tensors(windows_WL)
    return scores
