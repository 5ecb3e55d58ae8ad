"""The tokens on which a method learns what matters: from which text, how many, drawn how.

A source is ``builtin``, a FILE (``.txt``; ``.jsonl`` with a field ``text``; ``.npy`` with int64 token ids [rows, length]) or
``hub:org/name[@revision][:config]:split:field``. The digest of the token ids is part of every calibrated cell's identity.

Windows never overlap. The text is rotated by a random offset and cut into as many equal stretches as there are windows; each
window starts at random in its stretch. So a source needs ``samples x seqlen`` tokens; from one that has just so many, every
seed takes all of it, cut elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .cell import digest
from .errors import BadInput
from .models import ModelRef, cache_dir, file_digest, load_tokenizer, remember

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

#: Part of the key under which digests are remembered: raise it when the same configuration gives other tokens.
VERSION = 2
#: Files of so many bytes are tokenised once, and documents so many at a time.
LONG, BATCH = 2**20, 256
#: A text counts as seen if it shares this many words in a row with the calibration text (Brown et al. 2020, appendix C).
NGRAM = 13
#: Shorter texts count if they are there as a whole; below this many words that would be chance.
SHORTEST = 8


class CalibrationConfig(BaseModel):
    """What to calibrate on. Every field changes the tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | list[str] = Field(
        "builtin", description="builtin, FILE (.txt .jsonl .npy), hub:org/name[@rev][:config]:split:field"
    )
    weights: list[float] | None = Field(None, description="share of the windows from each source; None: equal shares")
    samples: int = Field(128, ge=1, description="windows; 128 is the published setting of GPTQ, Wanda and SparseGPT")
    seqlen: int = Field(2048, ge=8, description="tokens a window")
    seed: int = Field(0, ge=0, lt=2**63, description="draws offset and starts; a .npy file is taken in order and has no draw")
    template: bool = Field(
        False, description="wrap each window as a user's and an assistant's turn of the model's chat template"
    )
    system: str | None = Field(None, description="system prompt of the wrapped windows; None: the template's own")

    @model_validator(mode="after")
    def _fits(self) -> CalibrationConfig:
        if not self.sources:
            raise ValueError("source is empty; name at least one")
        if self.weights is not None:
            if len(self.weights) != len(self.sources):
                raise ValueError(f"{len(self.weights)} weights for {len(self.sources)} sources; give one for each")
            if not all(0 <= w < math.inf for w in self.weights) or not 0 < sum(self.weights) < math.inf:
                raise ValueError(f"weights {self.weights} must be finite and not negative, nor all zero")
        if self.system is not None and not self.template:
            raise ValueError("system has no place without template: true")
        return self

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else list(self.source)

    @property
    def shares(self) -> list[int]:
        """Windows from each source: largest remainders, so that they add up to ``samples``."""
        weights = self.weights or [1.0] * len(self.sources)
        exact = [self.samples * w / sum(weights) for w in weights]
        shares = [int(x) for x in exact]
        for i in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: self.samples - sum(shares)]:
            shares[i] += 1
        return shares


@dataclass(frozen=True)
class Calibration:
    """``tokens`` int64 [samples, seqlen]; ``digest`` of their ids and shape; ``texts`` the windows as text."""

    tokens: torch.Tensor
    digest: str
    texts: list[str]


def calibrate(config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, *, where: str = "calibration") -> Calibration:
    """Draw the windows. Raises BadInput if a source cannot be read or holds too few tokens, saying how many are needed."""
    import numpy as np
    import torch

    parts = []
    for source, share in zip(config.sources, config.shares, strict=True):
        if not share:
            continue
        if source.endswith(".npy"):
            parts.append(_stored_windows(_file(source, where), share, config, len(tokenizer), where))
        else:
            parts.append(_drawn_windows(source, share, config, tokenizer, where))
    ids = np.concatenate(parts)
    return Calibration(torch.from_numpy(ids), token_digest(ids), tokenizer.batch_decode(ids))


def default_size(source: str) -> dict[str, int]:
    """``samples`` and ``seqlen`` for one source where nobody chose: all of a ``.npy`` file, 16 x 512 of the built-in text (it has
    no more), else the published 128 x 2048. BadInput if a ``.npy`` file cannot be read."""
    if source == "builtin":
        return {"samples": 16, "seqlen": 512}
    if source.endswith(".npy"):
        rows, length = _load_ids(_file(source, "--calibration"), "--calibration").shape
        return {"samples": rows, "seqlen": length}
    return {"samples": 128, "seqlen": 2048}


def calibration_digest(config: CalibrationConfig, ref: ModelRef, *, where: str = "calibration") -> str:
    """Digest that ``calibrate`` would give, remembered on disk, so that a second start tokenises nothing.

    Not remembered for a hub source without a full commit, whose content may change.
    """
    contents = [_content(source, where) for source in config.sources]
    compute = lambda: calibrate(config, load_tokenizer(ref), where=where).digest
    if None in contents:
        return compute()
    settings = config.model_dump(exclude={"source"})
    return remember("calibration", [VERSION, ref.revision, contents, settings], compute)


def token_digest(ids: np.ndarray) -> str:
    """First 24 hex digits of SHA-256 over the shape and the ids as little-endian int64."""
    hashed = hashlib.sha256(json.dumps(ids.shape).encode())
    hashed.update(ids.astype("<i8").tobytes())
    return hashed.hexdigest()[:24]


def overlap(calibration: Calibration, items: Iterable[Iterable[str]]) -> float:
    """Share of items (0-1), each given as its texts, of which one text has 13 words in a row in common with the calibration text.

    Texts of 8 to 12 words count if they are there as a whole; shorter ones never count. Words are runs of letters and digits,
    case ignored. Brown et al. 2020, appendix C, uses the same lengths.
    """
    windows = [_words(text) for text in calibration.texts]
    seen: dict[int, set[tuple[str, ...]]] = {}

    @functools.cache  # the demonstrations of one item are those of many
    def shared(text: str) -> bool:
        words = _words(text)
        n = min(NGRAM, len(words))
        if n < SHORTEST:
            return False
        if n not in seen:
            seen[n] = {gram for window in windows for gram in _grams(window, n)}
        return not seen[n].isdisjoint(_grams(words, n))

    found = [any(map(shared, texts)) for texts in items]
    return sum(found) / len(found) if found else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _grams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


# --- windows -----------------------------------------------------------------------------------------------------------------


def _drawn_windows(source: str, samples: int, config: CalibrationConfig, tokenizer: Any, where: str) -> np.ndarray:
    import numpy as np

    # A wrapped window is cut after the template has added its marks, so that it may be re-tokenised a little shorter.
    length = config.seqlen + 32 if config.template else config.seqlen
    needed = samples * length
    ids = _token_stream(source, needed, tokenizer, where)
    if len(ids) < needed:
        raise BadInput(
            f"{source!r} has {len(ids)} tokens for this tokenizer, {samples} windows of {config.seqlen} need {needed}",
            where=f"{where}.source",
            fix=f"Lower samples or seqlen ({len(ids) // length} windows of {config.seqlen} fit) or give a longer text",
        )
    random = np.random.default_rng(config.seed)
    offset = random.integers(len(ids))
    stretch = len(ids) // samples
    starts = np.arange(samples) * stretch + random.integers(0, stretch - length + 1, size=samples)
    windows = ids[(offset + starts[:, None] + np.arange(length)) % len(ids)]
    random.shuffle(windows)
    return _wrap(windows, config, tokenizer, where) if config.template else windows


def _wrap(windows: np.ndarray, config: CalibrationConfig, tokenizer: Any, where: str) -> np.ndarray:
    import numpy as np
    from jinja2 import TemplateError

    from .evaluate.template import fixed

    if not tokenizer.chat_template:
        raise BadInput("the model has no chat template", where=f"{where}.template", fix="Set template: false")
    system = [{"role": "system", "content": config.system}] if config.system is not None else []
    rows = []
    for window in windows:
        half = len(window) // 2
        turns = [
            {"role": "user", "content": tokenizer.decode(window[:half])},
            {"role": "assistant", "content": tokenizer.decode(window[half:])},
        ]
        try:
            text = tokenizer.apply_chat_template(system + turns, tokenize=False, **fixed(tokenizer))
        except TemplateError as error:
            raise BadInput(
                f"the chat template refuses {', '.join(m['role'] for m in system + turns)}: {error}",
                where=f"{where}.{'system' if system else 'template'}",
                fix="Leave system out" if system else "Set template: false",
            ) from error
        if system and system[0]["content"].strip() not in text:
            raise BadInput("the chat template passes a system prompt over", where=f"{where}.system", fix="Leave system out")
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) < config.seqlen:
            raise BadInput(
                f"the chat template drops text: of a window of {len(window)} tokens it leaves {len(ids)}, {config.seqlen} are needed",
                where=f"{where}.template",
                fix="Set template: false",
            )
        rows.append(ids[: config.seqlen])
    wrapped = np.array(rows, dtype=np.int64)
    if (windows != windows[0]).any() and (wrapped == wrapped[0]).all():
        raise BadInput(
            f"the {'system prompt' if system else 'chat template'} fills the windows of {config.seqlen} tokens, no text is left in them",
            where=f"{where}.system" if system else f"{where}.template",
            fix="Shorten it or raise seqlen",
        )
    return wrapped


def _load_ids(file: Path, at: str) -> np.ndarray:
    import numpy as np

    try:
        ids = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise BadInput(
            f"cannot read {file}: {error}", where=at, fix="Give int64 token ids [samples, seqlen] by numpy.save"
        ) from error
    if not isinstance(ids, np.ndarray):
        raise BadInput(f"{file} is an archive (.npz)", where=at, fix="Give one array by numpy.save")
    if ids.dtype != np.int64 or ids.ndim != 2:
        raise BadInput(f"{file} holds {ids.dtype} {list(ids.shape)}", where=at, fix="Give int64 token ids [samples, seqlen]")
    return ids


def _stored_windows(file: Path, samples: int, config: CalibrationConfig, vocabulary: int, where: str) -> np.ndarray:

    at = f"{where}.source"
    if config.template:
        raise BadInput(
            f"{file} holds token ids, which no template can wrap", where=f"{where}.template", fix="Set template: false"
        )
    ids = _load_ids(file, at)
    rows, length = ids.shape
    if rows < samples or length < config.seqlen:
        raise BadInput(
            f"{file} holds {rows} windows of {length} tokens, {samples} of {config.seqlen} are needed",
            where=at,
            fix=f"Set samples to at most {rows} and seqlen to at most {length}",
        )
    ids = ids[:samples, : config.seqlen]
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise BadInput(
            f"{file} holds token ids from {ids.min()} to {ids.max()}, the model knows 0 to {vocabulary - 1}",
            where=at,
            fix="Tokenise the text with this model's tokenizer",
        )
    return ids


# --- sources -----------------------------------------------------------------------------------------------------------------


def _builtin() -> Path:
    return Path(str(files("comptrust.actors.data") / "calibration.txt"))


def _content(source: str, where: str) -> str | None:
    """What the text is, by content: None for a dataset that may change."""
    if source.startswith("hub:"):
        return source if re.search(r"@[0-9a-f]{40}(:|$)", source) else None
    path = _builtin() if source == "builtin" else _file(source, where)
    return path.suffix + file_digest(path)


def _file(source: str, where: str) -> Path:
    path = Path(source).expanduser()
    if path.suffix not in (".txt", ".jsonl", ".npy"):
        raise BadInput(
            f"unknown calibration source {source!r}",
            where=f"{where}.source",
            fix="Give builtin, a .txt, .jsonl or .npy file, or hub:org/name[:config]:split:field",
        )
    if not path.is_file():
        raise BadInput(
            f"no file {source!r}", where=f"{where}.source", fix="Check the path; it is relative to the working folder"
        )
    return path


def _token_stream(source: str, needed: int, tokenizer: Any, where: str) -> np.ndarray:
    """Token ids int64 [T] of a source's documents, one after the other with an empty line between. Those of a long file, and of a data
    set at a commit, are kept in the cache folder and read from there: every seed and every worker draws from them."""
    import numpy as np
    from filelock import FileLock

    fast = getattr(tokenizer, "backend_tokenizer", None)
    hub = source.startswith("hub:")
    content = _content(source, where)
    if source == "builtin" or fast is None or content is None or (not hub and _file(source, where).stat().st_size < LONG):
        return _tokenised(source, needed, tokenizer, where)
    made = None
    key = [content, type(tokenizer).__name__, fast.to_str(), *([needed] if hub else [])]  # read as far as needed
    file = cache_dir() / "calibration" / f"{digest(key)}.npy"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():
                made = _tokenised(source, needed, tokenizer, where)
                partial = file.with_suffix(".part")  # we hold the lock: one that is there is of a process that died
                with open(partial, "wb") as out:
                    np.save(out, made)
                    out.flush()
                    os.fsync(out.fileno())
                os.replace(partial, file)
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError:  # the cache is not ours to write
        return _tokenised(source, needed, tokenizer, where) if made is None else made


def _tokenised(source: str, needed: int, tokenizer: Any, where: str) -> np.ndarray:
    import numpy as np
    from tqdm import tqdm

    ids = array("q")  # a file of C4 has 200 million tokens: a list takes 40 bytes for each
    documents = _documents(source, where)
    with tqdm(desc=f"tokenise {Path(source).name}", unit=" tokens", unit_scale=True, delay=5, leave=False, disable=None) as bar:
        while batch := list(itertools.islice(documents, BATCH)):
            for tokens in tokenizer([text + "\n\n" for text in batch], add_special_tokens=False).input_ids:
                ids.extend(tokens)
                bar.update(len(tokens))
                if source.startswith("hub:") and len(ids) >= 2 * needed:  # a data set may hold terabytes: its beginning will do
                    return np.array(ids, dtype=np.int64)
    return np.array(ids, dtype=np.int64)


def _documents(source: str, where: str) -> Iterator[str]:
    if source.startswith("hub:"):
        yield from _dataset(source, where)
        return
    path = _builtin() if source == "builtin" else _file(source, where)
    at = f"{where}.source"
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}", where=at, fix="Give a readable UTF-8 file") from error
    if path.suffix == ".txt":
        yield content.strip("\n")
        return
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{path}, line {number}: no JSON object with a field 'text'", where=at, fix="One object a line"
            ) from error
        if not isinstance(text, str):
            raise BadInput(f"{path}, line {number}: 'text' is {type(text).__name__}", where=at, fix="Give a string")
        if half := re.search("[\ud800-\udfff]", text):
            raise BadInput(f"{path}, line {number}: half a character, {half[0]!a}", where=at, fix="Save it again as UTF-8")
        yield text


def _dataset(source: str, where: str) -> Iterator[str]:
    at = f"{where}.source"
    name, *rest = source.removeprefix("hub:").split(":")
    if len(rest) not in (2, 3):
        raise BadInput(
            f"cannot read {source!r}", where=at, fix="Write hub:org/name:split:field or hub:org/name:config:split:field"
        )
    config, split, field = rest if len(rest) == 3 else (None, *rest)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BadInput("hub: sources need the package datasets", where=at, fix="pip install 'comptrust[hub]'") from error
    name, _, revision = name.partition("@")
    try:
        for row in load_dataset(name, config, split=split, revision=revision or None, streaming=True):
            if isinstance(text := row[field], str):
                yield text
            elif text is not None:
                raise BadInput(
                    f"field {field!r} of {name} holds {type(text).__name__}", where=at, fix="Name a text field of the data set"
                )
    except BadInput:
        raise
    except KeyError as error:
        raise BadInput(f"{name} has no field {field!r}", where=at, fix="Name a text field of the data set") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"cannot load {source!r}: {error}", where=at, fix="Check name, config and split, and the connection"
        ) from error
