"""Compressed weights kept on disk, so that a killed or repeated cell compresses nothing twice.

A file per artefact: what differs from the dense model, and in its header everything else. The least recently used go first when
the budget is reached. Several processes may use one folder.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .base import Compressed, StoredLinear
from .structure import clone

log = logging.getLogger(__name__)

#: A file of a writer that died is removed when it has not grown for this long.
ABANDONED_S = 6 * 3600
_TENSORS = ("codes", "scale", "zero", "group_index", "input_scale")


class ArtifactCache:
    """Files ``<key>.safetensors`` in ``root``, together at most ``budget_bytes``."""

    def __init__(self, root: Path | str, budget_bytes: int) -> None:
        self.root, self.budget = Path(root), budget_bytes
        self.root.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors on the CPU and metadata, or None. A file that cannot be read is removed and counts as absent."""
        path = self._path(key)
        try:
            # Under the lock: safetensors opens the file twice, and eviction or a new version must not come in between.
            with FileLock(self.root / ".lock"), safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
                about = file.metadata() or {}
                meta = json.loads(about["meta"])
            if about["crc32"] != checksum(tensors):  # a header that reads well says nothing about the weights behind it
                raise ValueError("its checksum is another")
            os.utime(path)
        except FileNotFoundError:  # absent, or evicted by another process just now
            return None
        except (SafetensorError, KeyError, ValueError) as error:
            log.warning("cached artefact %s is damaged (%s); it will be made again", path, error)
            path.unlink(missing_ok=True)
            return None
        return tensors, meta

    def put(self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bool:
        """Keep an artefact, whole or not at all; False if it alone is larger than the budget. ``meta`` is JSON. OSError: a full disk."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if size > self.budget:
            return False
        self._sweep(room_for=size)
        descriptor, temporary = tempfile.mkstemp(dir=self.root, prefix=f".{key}-")
        os.close(descriptor)
        try:
            own = separate(tensors)
            save_file(own, temporary, metadata={"meta": json.dumps(meta), "crc32": checksum(own)})
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            with FileLock(self.root / ".lock"):
                os.replace(temporary, self._path(key))
        except SafetensorError as error:  # what its writer makes of an error of the disk
            raise OSError(str(error)) from error
        finally:
            Path(temporary).unlink(missing_ok=True)
        self._sweep(room_for=0)
        return True

    def _path(self, key: str) -> Path:
        return self.root / f"{key}.safetensors"

    def _sweep(self, *, room_for: int) -> None:
        with FileLock(self.root / ".lock"):
            now = time.time()
            for modified, _, left in _files(self.root, ".*-*"):
                if now - modified / 1e9 > ABANDONED_S:
                    left.unlink(missing_ok=True)
            found = sorted(_files(self.root, "*.safetensors"))
            total = sum(size for _, size, _ in found)
            for _, size, path in found:
                if total + room_for <= self.budget:
                    break
                path.unlink(missing_ok=True)
                total -= size


def _files(root: Path, pattern: str) -> Iterator[tuple[int, int, Path]]:
    """(time of change in ns, size, path) of the files still there when it is their turn."""
    for path in root.glob(pattern):
        with suppress(FileNotFoundError):  # renamed or evicted by another process
            stat = path.stat()
            yield stat.st_mtime_ns, stat.st_size, path


def dump(compressed: Compressed, dense: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What it takes to make ``compressed`` from ``dense`` again, bit for bit.

    A weight that its codes give exactly is not kept beside them. None if a layer's class was replaced (bitsandbytes,
    SmoothQuant): those hold state that only their own library can write, and are quick to make again.
    """
    modules, originals = dict(compressed.model.named_modules()), dict(dense.named_modules())
    if modules.keys() != originals.keys() or any(type(modules[n]) is not type(originals[n]) for n in modules):
        return None
    before = dict(dense.named_parameters(remove_duplicate=False))
    tensors, rebuilt = {}, []
    for name, parameter in compressed.model.named_parameters(remove_duplicate=False):
        if parameter is before.get(name):
            continue
        stored = compressed.stored.get(name.removesuffix(".weight"))
        if _gives(stored, parameter):
            rebuilt.append(name)
        else:
            tensors[f"weight:{name}"] = parameter.data
    for name, stored in compressed.stored.items():
        tensors |= {f"{t}:{name}": getattr(stored, t) for t in _TENSORS if getattr(stored, t) is not None}
    meta = {f.name: getattr(compressed, f.name) for f in dataclasses.fields(compressed) if f.name not in ("model", "stored")}
    meta["rebuilt"] = rebuilt
    meta["stored"] = [
        {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.name not in _TENSORS}
        for s in compressed.stored.values()
    ]
    return tensors, meta


def restore(dense: nn.Module, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Compressed:
    """The ``Compressed`` that was dumped; everything untouched is shared with ``dense``, and new tensors go where their modules are."""

    def home(name: str) -> torch.device:  # a model may be spread over several
        return next(dense.get_submodule(name).parameters()).device

    stored = {}
    for row in meta["stored"]:
        name = row["name"]
        parts = {t: tensors[f"{t}:{name}"].to(home(name)) for t in _TENSORS if f"{t}:{name}" in tensors}
        stored[name] = StoredLinear(**{**row, "shape": tuple(row["shape"])}, **parts)
    model = clone(dense)
    for name in meta["rebuilt"]:
        old = dense.get_parameter(name)
        _set(model, name, stored[name.removesuffix(".weight")].dequantise().to(old.dtype))
    for name, tensor in tensors.items():
        kind, _, parameter = name.partition(":")
        if kind == "weight":
            _set(model, parameter, tensor.to(home(parameter.rpartition(".")[0])))
    rest = {k: v for k, v in meta.items() if k not in ("rebuilt", "stored")}
    return Compressed(model, stored=stored, **rest)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 over names and bytes of contiguous tensors on the CPU."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each with memory of its own: q, k and v may be slices of one tensor or share a group index, which safetensors
    refuses or takes for tied weights."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous().cpu()
        shares = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() or tensor.data_ptr() in seen
        out[name] = tensor.clone() if shares else tensor
        seen.add(tensor.data_ptr())
    return out


def _gives(stored: StoredLinear | None, parameter: Tensor) -> bool:
    if stored is None or stored.codes is None or stored.input_scale is not None:
        return False
    return torch.equal(stored.dequantise().to(parameter.device, parameter.dtype), parameter)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
