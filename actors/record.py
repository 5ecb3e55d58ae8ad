"""The record: four Parquet tables of part files, one commit mark a cell, any pyarrow filesystem.

A finished cell is ``layers/``, ``items/``, ``metrics/`` and last ``cells/<key>.parquet``: readers ignore the others without it, and
only it causes a skip. Local files go through a dot-tmp in the same folder, fsync, rename, fsync of the folder; object stores get one put.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from .errors import BadInput

#: ``://name:password@`` of an address. A password may hold slashes (AWS's do); a port and an "@" behind it are none.
_PASSWORD = re.compile(r"://[^/@:]+:(?!\d+/)[^@]*@")
#: ``s3:/bucket``: it would be a folder of that name here.
_SCHEME = re.compile(r"(s3|gs|gcs|hdfs|abfss?|file):(?!//)")
SCHEMA_VERSION = 1
_META = {b"comptrust.schema": str(SCHEMA_VERSION).encode()}

_s, _f, _i, _b = pa.string(), pa.float64(), pa.int64(), pa.bool_()
_time = pa.timestamp("us", tz="UTC")


def _schema(*columns: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(n, t) for n, t in columns], metadata=_META)


CELLS = _schema(
    ("key", _s), ("artifact_key", _s), ("model", _s), ("revision", _s), ("method", _s), ("bits", _i), ("group_size", _i),
    ("sparsity", _f), ("pattern", _s), ("params", _s), ("backend", _s), ("dtype", _s), ("calibration", _s),
    ("calibration_digest", _s), ("samples", _i), ("seqlen", _i), ("template", _s), ("seed", _i), ("overlap", _f), ("suite", _s),
    ("evaluation", _s),
    ("status", _s), ("error_type", _s), ("error", _s), ("attempts", _i), ("parameters", _i), ("size_bytes", _i),
    ("bits_per_weight", _f), ("sparsity_reached", _f), ("execution", _s), ("kernel", _s), ("compress_s", _f), ("evaluate_s", _f),
    ("peak_memory_bytes", _i), ("prefill_tokens_s", _f), ("decode_tokens_s", _f), ("device", _s), ("versions", _s),
    ("started_at", _time), ("finished_at", _time),
)  # fmt: skip
METRICS = _schema(
    ("key", _s), ("convention", _s), ("dimension", _s), ("scenario", _s), ("metric", _s), ("value", _f), ("n", _i),
    ("ci_low", _f), ("ci_high", _f), ("scorer", _s), ("scorer_version", _s),
)  # fmt: skip
ITEMS = _schema(
    ("key", _s), ("dimension", _s), ("scenario", _s), ("item", _s), ("sample", _i), ("cluster", _s), ("prompt_sha", _s),
    ("target", _s), ("outcome", _s), ("finish_reason", _s), ("score", _f), ("text", _s), ("text_sha", _s),
)  # fmt: skip
LAYERS = _schema(("key", _s), ("layer", _s), ("error", _f), ("sparsity", _f), ("bits", _f))
TABLES = {"cells": CELLS, "metrics": METRICS, "items": ITEMS, "layers": LAYERS}
#: Utility and divergence live in ``metrics`` beside the dimensions, under these names.
UTILITY = "utility"  # metrics: perplexity, mmlu, mmlu_macro, lm_eval tasks
DIVERGENCE = "divergence"  # metrics: kl_dense, top1_agreement, flips


def to_table(name: str, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of the fixed schema; absent columns are NULL, unknown ones a ``KeyError``, dicts become JSON."""
    schema = TABLES[name]
    names = set(schema.names)
    out = []
    for row in rows:
        if extra := set(row) - names:
            raise KeyError(f"{name} has no column {sorted(extra)}; it has {schema.names}")
        out.append({k: json.dumps(v, sort_keys=True) if isinstance(v, Mapping | list | tuple) else v for k, v in row.items()})
    return pa.Table.from_pylist(out, schema=schema)


def _patience(uri: str) -> str:
    """``uri`` with a limit of half a minute to Google's retries: pyarrow's own is a quarter of an hour, without a word."""
    if not uri.startswith(("gs://", "gcs://")) or "retry_limit_seconds" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds=30"


class Record:
    """Parts of one results folder or URI (``results/x``, ``s3://bucket/x``). Creating one touches nothing."""

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        if secret := _PASSWORD.search(self.uri):
            raise BadInput(
                f"{self.uri[: secret.start()]}://...@{self.uri[secret.end() :]} holds a password", where="results",
                fix="Secrets come from the environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
            )  # fmt: skip
        try:
            if "://" in self.uri:
                self.fs, self.root = pafs.FileSystem.from_uri(_patience(self.uri))
            else:
                self.fs, self.root = pafs.LocalFileSystem(), str(Path(self.uri).expanduser().absolute())
        except (pa.ArrowInvalid, OSError) as e:
            raise BadInput(f"cannot open {self.uri!r}: {e}", where="results", fix="Give a folder, s3://... or gs://...") from e
        if _SCHEME.match(self.uri) or not self.uri.strip() or (not self.root.strip("/") and "://" in self.uri):
            # a slip of the pen, or a variable of a script that is not set
            raise BadInput(
                f"{self.uri!r} names no place", where="results", fix="Give a folder, s3://BUCKET... or gs://BUCKET..."
            )
        self.local = isinstance(self.fs, pafs.LocalFileSystem)
        #: What names this record from any working folder.
        self.address = self.uri if "://" in self.uri else self.root

    # -- writing ------------------------------------------------------------------------------------------------------

    def put(self, path: str, data: bytes) -> None:
        """Write ``data`` under ``root/path`` so that a reader sees all of it or nothing, also after a crash."""
        full = f"{self.root}/{path}"
        if not self.local:
            with self.fs.open_output_stream(full) as f:
                f.write(data)
            return
        target = Path(full)
        target.parent.mkdir(parents=True, exist_ok=True)
        tmp = target.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            with open(tmp, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, target)
        finally:
            tmp.unlink(missing_ok=True)
        fd = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def put_table(self, path: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self.put(path, sink.getvalue())

    def commit(
        self,
        cell: Mapping[str, Any],
        metrics: Sequence[Mapping[str, Any]],
        items: Sequence[Mapping[str, Any]],
        layers: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write a finished cell, the mark last; rows get the cell's ``key``. Partial files of the cell are removed after."""
        key = cell["key"]
        for name, rows in (("layers", layers), ("items", items), ("metrics", metrics)):
            self.put_table(f"{name}/{key}.parquet", to_table(name, [{**r, "key": key} for r in rows]))
        self.put_table(f"cells/{key}.parquet", to_table("cells", [cell]))
        with contextlib.suppress(OSError):  # no right to delete: the cell is there all the same
            self.delete_dir(f"partial/{key}")

    def fail(self, cell: Mapping[str, Any]) -> None:
        """A failed attempt: a row with ``error_type``, ``error``, ``attempts``; never causes a skip."""
        self.put_table(f"failed/{cell['key']}-{cell['attempts']}.parquet", to_table("cells", [{**cell, "status": "failed"}]))

    def put_partial(self, key: str, task: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Items of one finished task of an unfinished cell, so that a kill costs at most one task."""
        self.put_table(f"partial/{key}/{task}.parquet", to_table("items", [{**r, "key": key} for r in rows]))

    def put_json(self, path: str, value: Any) -> None:
        self.put(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def put_tensors(self, path: str, tensors: Mapping[str, Any]) -> None:
        from safetensors.torch import save

        self.put(path, save(dict(tensors)))

    def delete_dir(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(f"{self.root}/{path}")

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.root}/{path}")

    # -- reading ------------------------------------------------------------------------------------------------------

    def check_readable(self, where: str = "RESULTS") -> None:
        """``BadInput`` if the place does not answer: no network, no such bucket, no right to read."""
        try:
            self.fs.get_file_info(self.root)
        except (OSError, ValueError) as e:
            raise BadInput(
                f"cannot read {self.uri!r}: {e}", where=where, fix="Check the address, the network and the credentials."
            ) from e

    def get(self, path: str) -> bytes | None:
        """Bytes of ``root/path``, or None if there is no such file."""
        try:
            with self.fs.open_input_file(f"{self.root}/{path}") as f:
                return f.read()
        except FileNotFoundError:
            return None

    def get_json(self, path: str) -> Any | None:
        """A JSON file, or None if it is absent or is no whole one."""
        try:
            return json.loads(self.get(path) or b"null")
        except ValueError:
            return None

    def sweeps(self) -> list[dict[str, Any]]:
        """What ``sweeps/`` holds, foreign files left out."""
        found = [self.get_json(path) for path in self.list("sweeps", ".json")]
        return [s for s in found if isinstance(s, dict) and {"id", "name", "config", "keys"} <= s.keys()]

    def failures(self) -> pa.Table:
        """All failed attempts, foreign files left out."""
        tables = [self.get_table(path) for path in self.list("failed")]
        ours = [t.select(CELLS.names).cast(CELLS) for t in tables if t is not None and set(CELLS.names) <= set(t.column_names)]
        return pa.concat_tables([CELLS.empty_table(), *ours])

    def get_table(self, path: str) -> pa.Table | None:
        """A part, or None if it is absent or is no whole Parquet file of ours; a newer schema is ``BadInput``."""
        data = self.get(path)
        if data is None:
            return None
        try:
            table = pq.read_table(io.BytesIO(data))
        except (pa.ArrowInvalid, OSError):
            return None
        check_version(table.schema, f"{self.uri}/{path}")
        return table

    def get_tensors(self, path: str) -> dict[str, Any] | None:
        from safetensors.torch import load, load_file

        if self.local:  # mapped, not copied: a reference is 200 MB and more
            full = Path(self.root, path)
            return load_file(full) if full.exists() else None
        data = self.get(path)
        return None if data is None else load(data)

    def list(self, folder: str, suffix: str = ".parquet") -> list[str]:
        """Paths below ``root`` of the files in ``folder``, sorted; temporary files are not listed."""
        return sorted(self.written(folder, suffix))

    def written(self, folder: str, suffix: str = ".parquet") -> dict[str, int]:
        """When each file that ``list`` names was last written, in ns by the clock of the store."""
        selector = pafs.FileSelector(f"{self.root}/{folder}", allow_not_found=True)
        prefix = len(self.root.rstrip("/")) + 1
        return {
            i.path[prefix:]: i.mtime_ns or 0
            for i in self.fs.get_file_info(selector)
            if i.type == pafs.FileType.File and i.base_name.endswith(suffix) and not i.base_name.startswith(".")
        }

    def done(self) -> set[str]:
        """Keys of all committed cells, compacted ones included. A cell whose parts were damaged or removed since is not among them."""
        keys = self.parts()
        for path in self.list("compact/cells"):
            table = self.get_table(path)
            if table is not None:
                keys.update(table.column("key").to_pylist())
        return keys

    def parts(self) -> set[str]:
        """Keys of the cells that stand as part files, all four of them whole."""
        return set.intersection(*(self._whole(name) for name in TABLES))

    def _whole(self, folder: str) -> set[str]:
        """Keys of the part files of ``folder`` that end as Parquet files do."""
        paths = self.list(folder)
        with ThreadPoolExecutor(1 if self.local else 16) as pool:
            return {Path(p).stem for p, ok in zip(paths, pool.map(self._ends_well, paths), strict=True) if ok}

    def _ends_well(self, path: str) -> bool:
        if self.local:
            with open(f"{self.root}/{path}", "rb") as f:
                f.seek(-min(4, os.fstat(f.fileno()).st_size), os.SEEK_END)
                return f.read() == b"PAR1"
        return True  # an object store shows whole objects only

    def committed(self, key: str) -> dict[str, Any] | None:
        """The row of a finished cell, its metrics under ``"metrics"``; None if it is absent or one of its parts is damaged."""
        tables = {}
        for name in TABLES:  # the mark first: most cells that are asked for have none
            tables[name] = self.get_table(f"{name}/{key}.parquet")
            if tables[name] is None:
                return None
        return {**tables["cells"].to_pylist()[0], "metrics": tables["metrics"].to_pylist()}

    def partials(self, key: str) -> dict[str, list[dict[str, Any]]]:
        """Stored items of an unfinished cell, by task."""
        out = {}
        for path in self.list(f"partial/{key}"):
            table = self.get_table(path)
            if table is not None:
                out[Path(path).stem] = table.to_pylist()
        return out


def check_version(schema: pa.Schema, where: str) -> None:
    """``BadInput`` if a file was written by a newer comptrust."""
    version = int((schema.metadata or {}).get(b"comptrust.schema", b"0"))
    if version > SCHEMA_VERSION:
        raise BadInput(
            f"written with record schema {version}, this comptrust reads up to {SCHEMA_VERSION}",
            where=where,
            fix="Upgrade comptrust (pip install -U comptrust), or use another results folder.",
        )
