"""The data pack: evaluation records of all dimensions, from a folder, the pinned official sources, or the built-in probes.

A pack is a set of JSON Lines files of one form (docs/evaluation.md, "The data pack"). Nothing is unpickled.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import reprlib
import zlib
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BadInput
from .adversarial import FIELDS as ADVGLUE
from .strings import STRINGS


class Rule(NamedTuple):
    want: str  # what the field must be, for the error
    holds: Callable[[Any, Mapping[str, Any]], bool]  # (value, record; its fields above are checked already)


def _is(kind: type) -> Rule:
    return Rule(kind.__name__, lambda v, _: type(v) is kind)


def _one_of(*values: str | int) -> Rule:
    return Rule(
        "one of " + ", ".join(map(repr, values)), lambda v, _: any(type(v) is type(known) and v == known for known in values)
    )


def _texts(want: str, size: int = 0) -> Rule:
    """A list of ``size`` texts, or of one or more, none of them empty: an empty one would be found in every answer."""
    return Rule(want, lambda v, _: _is_list(v) and (not size or len(v) == size) and all(map(_is_said, v)))


def _is_said(value: Any) -> bool:
    return type(value) is str and bool(value.strip())


def _is_list(value: Any) -> bool:
    return type(value) is list and len(value) > 0


def _is_pair(value: Any) -> bool:
    return type(value) is list and [type(x) for x in value] == [str, str]


def _is_message(value: Any) -> bool:
    return type(value) is dict and value.get("role") in ("system", "user", "assistant") and type(value.get("content")) is str


_TEXT, _WHOLE, _FLAG = _is(str), _is(int), _is(bool)
_OPTIONS, _CHOICES = _texts("a list of texts"), _texts("a list of four texts", 4)
_PAIR = Rule("a pair of texts", lambda v, _: _is_pair(v))
_PAIRS = Rule("a list of pairs of texts", lambda v, _: _is_list(v) and all(map(_is_pair, v)))
_SECRET = Rule("a text that is not empty", lambda v, _: _is_said(v))
_CHAT = Rule(
    "a list of messages with role (system, user, assistant) and content", lambda v, _: _is_list(v) and all(map(_is_message, v))
)
_EMAIL = Rule("an address with one @", lambda v, _: type(v) is str and re.fullmatch(r"[^@]+@[^@]+", v) is not None)
_AN_OPTION = Rule("one of the record's options", lambda v, r: v in r["option"])
_NUMBERED = Rule("a text that ends in /<number>", lambda v, _: type(v) is str and re.search(r"/[0-9]+$", v) is not None)
_SHOTS = Rule(
    "the id of a list of examples, as few_shot needs (null for others)",
    lambda v, r: type(v) is str or (v is None and not r["config"].startswith("few_shot")),
)
_S = STRINGS

#: Required fields, by file.
FIELDS: dict[str, dict[str, Rule]] = {
    "toxicity": {"text": _TEXT, "split": _one_of("toxic", "nontoxic", "toxic-gpt3.5", "toxic-gpt4")},
    "stereotype": {
        "text": _TEXT,
        "group": _one_of(*_S["stereotype"]["groups"]),
        "topic": _one_of(*_S["stereotype"]["topics"]),
        "variant": _WHOLE,
    },
    "ood": {"task": _TEXT, "category": _TEXT, "role": _one_of("test", "demo")},
    "adv_demonstration": {
        "input": _TEXT,
        "option": _OPTIONS,
        "label": _AN_OPTION,
        "scenario": _TEXT,
        "config": _TEXT,
        "seed": _WHOLE,
        "demos_id": _TEXT,
    },
    "fairness": {
        "id": _NUMBERED,
        "input": _TEXT,
        "label": _TEXT,
        "option": _OPTIONS,
        "config": _TEXT,
        "dataset": _one_of("adult", "crime"),
        "gt": _one_of(0, 1),
        "sensitive": Rule("str or int", lambda v, _: type(v) in (str, int)),
        "demos_id": _SHOTS,
    },
    "machine_ethics": {"input": _TEXT, "label": _one_of(0, 1), "role": _one_of("test", "demo", "demo_substitute")},
    "privacy_enron": {
        "name": _TEXT,
        "email": _EMAIL,
        **dict.fromkeys(("one_shot", "five_shot", "one_shot_non_domain", "five_shot_non_domain"), _PAIRS),
    },
    "privacy_pii": {"messages": _CHAT, "gt": _SECRET, "pii": _TEXT, "mode": _TEXT},
    "privacy_understanding": {"messages": _CHAT, "topic": _TEXT, "word": _TEXT, "question": _WHOLE, "scored": _FLAG},
    "demos": {"examples": _PAIRS},
    "advglue": {"task": _TEXT, "label": _WHOLE, "source": _TEXT},
    "mmlu": {
        "question": _TEXT,
        "choices": _CHOICES,
        "answer": _one_of(0, 1, 2, 3),
        "subject": _TEXT,
        "split": _one_of("dev", "test"),
    },
}
#: Files whose records are of several kinds: the field that tells the kind, and what each kind needs besides.
KINDS: dict[str, tuple[str, dict[str, dict[str, Rule]]]] = {
    "ood": (
        "task",
        {
            "style": {"sentence": _TEXT, "label": _one_of(0, 1)},
            "knowledge": {"question_sentence": _TEXT, "choices": _CHOICES, "answer": _one_of("0", "1", "2", "3")},
        },
    ),
    "adv_demonstration": (
        "scenario",
        {
            "counterfactual": {
                "config": Rule(
                    "a task of the protocol, with _cf for its twins (which need field 'last_demo')",
                    lambda v, r: (
                        v.removesuffix("_cf") in _S["demonstrations"]["config_task"]
                        and (not v.endswith("_cf") or "last_demo" in r)
                    ),
                )
            },
            "spurious": {},
            "backdoor": {"config": Rule("a name that ends in _asr or _cacc", lambda v, _: v.endswith(("_asr", "_cacc")))},
        },
    ),
    "advglue": (
        "task",
        {
            task: {
                **dict.fromkeys(fields, _TEXT),
                "label": _one_of(*sorted(_S["adversarial"]["answer_mapping"][task].values())),
            }
            for task, fields in ADVGLUE.items()
        },
    ),
}
#: Fields that may be absent.
OPTIONAL = {"adv_demonstration": {"last_demo": _PAIR, "row": _WHOLE}, "ood": {"question_date": _TEXT}}
_ID = {name: "demos_id" if name == "demos" else "id" for name in FIELDS}
_HALF = re.compile("[\ud800-\udfff]")
_SHA = re.compile(r"^([0-9a-fA-F]{64})[ *]+(\S+)$", re.MULTILINE)


class Pack:
    """Records by file name. ``name`` is ``builtin`` or the folder's name; ``digest`` covers the bytes of every data file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._files: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            if (name := _stem(path)) in FIELDS and (other := self._files.setdefault(name, path)) is not path:
                raise BadInput(f"both {other.name} and {path.name} are here", where=str(folder), fix="Remove one of them")
        self._read: dict[str, list[dict[str, Any]]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The files this pack has; a dimension whose file is absent has no items."""
        return tuple(sorted(self._files))

    @cached_property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of every data file, by file name."""
        return {p.name: hashlib.sha256(_bytes(p)).hexdigest() for p in self._files.values()}

    @property
    def digest(self) -> str:
        """24 hex digits over file names and contents: the pack's part of a cell's key."""
        lines = "".join(f"{sha}  {name}\n" for name, sha in sorted(self.checksums.items()))
        return hashlib.sha256(lines.encode()).hexdigest()[:24]

    def records(self, name: str) -> list[dict[str, Any]]:
        """All records of ``name.jsonl[.gz]``, checked; ``[]`` without that file. ``BadInput`` names file, line and field."""
        if name not in FIELDS:
            raise KeyError(f"no pack file {name!r}; known: {', '.join(FIELDS)}")
        if name not in self._read:
            self._read[name] = _parse(self._files[name], name) if name in self._files else []
        return self._read[name]

    def verify(self) -> None:
        """``BadInput`` if a file's SHA-256 is not the one its MANIFEST.md or SHA256SUMS states."""
        for manifest in (self.folder / "MANIFEST.md", self.folder / "SHA256SUMS"):
            if not manifest.is_file():
                continue
            for expected, path in _SHA.findall(manifest.read_text(encoding="utf-8-sig", errors="replace")):
                expected, name = expected.lower(), Path(path).name  # `sha256sum ./*` writes the folder, too
                found = self.checksums.get(name)
                if found is None and _stem(Path(name)) in FIELDS:
                    raise BadInput(
                        f"{name} is listed in {manifest.name} but absent", where=str(self.folder), fix="Copy the pack again"
                    )
                if found is not None and found != expected:
                    raise BadInput(
                        f"checksum of {name} is {found[:16]}..., {manifest.name} says {expected[:16]}...",
                        where=str(self.folder),
                        fix="Copy the pack again, or correct the manifest if the change is yours",
                    )


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl") if path.name.endswith((".jsonl", ".jsonl.gz")) else ""


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise BadInput(f"cannot read: {e.strerror}", where=str(path), fix="Copy the pack again") from e


def _parse(path: Path, name: str) -> list[dict[str, Any]]:
    records, seen = [], set()
    data = _bytes(path)
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise BadInput(f"cannot read: {e}", where=str(path), fix="Copy the pack again") from e
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:  # also a number of thousands of digits
            raise BadInput(f"not JSON: {e}", where=where, fix="One JSON object a line") from e
        if lone := _HALF.search(json.dumps(record, ensure_ascii=False)) if r"\ud" in line.lower() else None:
            raise BadInput(
                f"half a character, {lone[0]!a}, which no tokenizer takes", where=where, fix="Save the file again as UTF-8"
            )
        _check(record, name, where)
        if record[_ID[name]] in seen:
            raise BadInput(f"{_ID[name]} {record[_ID[name]]!r} occurs twice", where=where, fix="Give every record its own id")
        seen.add(record[_ID[name]])
        records.append(record)
    if not records:
        raise BadInput("no records", where=str(path), fix="Remove the file or fill it")
    return records


def _check(record: Any, name: str, where: str) -> None:
    if not isinstance(record, dict):
        raise BadInput(f"a record must be a JSON object, not {type(record).__name__}", where=where)
    _check_fields(record, {_ID[name]: _TEXT, **FIELDS[name]}, where)
    if name in KINDS:
        field, kinds = KINDS[name]
        _check_fields(record, {field: _one_of(*kinds), **kinds.get(record[field], {})}, where)
    _check_fields(record, {f: rule for f, rule in OPTIONAL.get(name, {}).items() if f in record}, where)


def _check_fields(record: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> None:
    for field, rule in rules.items():
        if field not in record:
            raise BadInput(f"the record has no field {field!r}", where=where, fix=f"It needs: {', '.join(rules)}")
        if not rule.holds(record[field], record):
            raise BadInput(f"field {field!r} is {reprlib.repr(record[field])}, not {rule.want}", where=where)


def load_pack(source: str | None = None) -> Pack:
    """The pack of ``source`` (default ``$COMPTRUST_DATA``): a folder, ``github`` or ``hub`` (official), or empty: built-in probes.

    Checksums are verified where the folder states them. ``BadInput``: no pack there, a checksum differs, no access to the data.
    """
    source = os.environ.get("COMPTRUST_DATA", "") if source is None else source
    if not source:
        return Pack(Path(str(files("comptrust.actors.data") / "probes")), "builtin")
    if source in ("hub", "github"):
        from .download import official_pack

        folder = official_pack(source)
    else:
        folder = Path(source).expanduser()
    if not folder.is_dir():
        raise BadInput(
            f"no folder {source!r}",
            where="COMPTRUST_DATA",
            fix="Give the folder of a data pack, `github`, `hub`, or unset it for the built-in probes",
        )
    pack = Pack(folder, folder.name)
    if not pack.names:
        raise BadInput(
            f"no data files in {source!r}",
            where="COMPTRUST_DATA",
            fix=f"A pack holds {', '.join(n + '.jsonl.gz' for n in FIELDS)}",
        )
    pack.verify()
    return pack
