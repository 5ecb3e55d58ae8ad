"""The data pack: evaluation records of all dimensions, from a folder, the pinned official sources, or the built-in probes.

A pack is a set of JSON Lines files of one form (docs/evaluation.md, "The data pack"). Nothing is unpickled.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import BadInput

#: Required fields and their JSON types, by file. A field may hold null only where NoneType is listed.
_TEXT, _WHOLE, _LIST, _FLAG = (str,), (int,), (list,), (bool,)
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "toxicity": {"text": _TEXT, "split": _TEXT},
    "stereotype": {"text": _TEXT, "group": _TEXT, "topic": _TEXT, "variant": _WHOLE},
    "ood": {"task": _TEXT, "category": _TEXT, "role": _TEXT},
    "adv_demonstration": {
        "input": _TEXT,
        "label": _TEXT,
        "option": _LIST,
        "scenario": _TEXT,
        "config": _TEXT,
        "seed": _WHOLE,
        "demos_id": _TEXT,
    },
    "fairness": {
        "input": _TEXT,
        "label": _TEXT,
        "option": _LIST,
        "config": _TEXT,
        "dataset": _TEXT,
        "gt": _WHOLE,
        "sensitive": (str, int),
        "demos_id": (str, type(None)),
    },
    "machine_ethics": {"input": _TEXT, "label": _WHOLE, "role": _TEXT},
    "privacy_enron": {"name": _TEXT, "email": _TEXT, "one_shot": _LIST, "five_shot": _LIST},
    "privacy_pii": {"messages": _LIST, "gt": _TEXT, "pii": _TEXT, "mode": _TEXT},
    "privacy_understanding": {"messages": _LIST, "topic": _TEXT, "word": _TEXT, "question": _WHOLE, "scored": _FLAG},
    "demos": {"examples": _LIST},
    "advglue": {"task": _TEXT, "label": _WHOLE, "source": _TEXT},
    "mmlu": {"question": _TEXT, "choices": _LIST, "answer": _WHOLE, "subject": _TEXT, "split": _TEXT},
}
_ID = {name: "demos_id" if name == "demos" else "id" for name in FIELDS}
_SHA = re.compile(r"^([0-9a-f]{64})[ *]+(\S+)$", re.MULTILINE)


class Pack:
    """Records by file name. ``name`` is ``builtin`` or the folder's name; ``digest`` covers the bytes of every data file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._files = {_stem(p): p for p in sorted(folder.iterdir()) if _stem(p) in FIELDS}
        self._read: dict[str, list[dict[str, Any]]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The files this pack has; a dimension whose file is absent has no items."""
        return tuple(sorted(self._files))

    @cached_property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of every data file, by file name."""
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in self._files.values()}

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
            for expected, name in _SHA.findall(manifest.read_text(encoding="utf-8")):
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


def _parse(path: Path, name: str) -> list[dict[str, Any]]:
    fields, records, seen = {_ID[name]: _TEXT, **FIELDS[name]}, [], set()
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read: {e}", where=str(path), fix="Copy the pack again") from e
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            raise BadInput(f"not JSON: {e}", where=where, fix="One JSON object a line") from e
        _check(record, fields, where)
        if record[_ID[name]] in seen:
            raise BadInput(f"{_ID[name]} {record[_ID[name]]!r} occurs twice", where=where, fix="Give every record its own id")
        seen.add(record[_ID[name]])
        records.append(record)
    if not records:
        raise BadInput("no records", where=str(path), fix="Remove the file or fill it")
    return records


def _check(record: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(record, dict):
        raise BadInput(f"a record must be a JSON object, not {type(record).__name__}", where=where)
    for field, types in fields.items():
        if field not in record:
            raise BadInput(f"the record has no field {field!r}", where=where, fix=f"It needs: {', '.join(fields)}")
        value = record[field]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            want = " or ".join(t.__name__ for t in types)
            raise BadInput(f"field {field!r} is {value!r}, not {want}", where=where)


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
