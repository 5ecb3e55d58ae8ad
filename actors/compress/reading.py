"""Checkpoints of other libraries read back as ours: codes, scales and zero points of each layer, and what else they changed.

GPTQ's layout (AutoGPTQ, GPTQModel), AWQ's GEMM layout, compressed-tensors pack-quantized, and dense safetensors. The inverse of
``export``; the layouts are described in ``docs/export.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CellError
from ..models import rename
from .base import Compressed, StoredLinear, element_bytes, packed_bytes, zero_bytes
from .storing import layer_row, totals
from .structure import clone, decoder_blocks, named_linears

#: AWQ's GEMM layout puts output 0, 2, 4, 6, 1, 3, 5, 7 of eight into the nibbles of a word, low first; this undoes it.
_AWQ_INVERSE = [0, 4, 1, 5, 2, 6, 3, 7]


def read_checkpoint(folder: Path, dense: nn.Module, *, pattern: str | None = None) -> Compressed:
    """The model in ``folder``, on a copy of ``dense`` (same architecture, which is not changed).

    ``pattern`` marks a pruned checkpoint. Raises CellError if a layer is missing, has another shape, or nothing was compressed.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= rename(dense, load_file(file))
    scheme = _scheme(folder)
    stored = {s.name: s for s in _layers(tensors, scheme)}
    prefix, blocks = decoder_blocks(dense)
    linears = named_linears(prefix, blocks)
    stored |= {name: s for name in linears if name not in stored and (s := _fused(name, stored))}
    model = clone(dense)
    for name, parameter in dense.named_parameters():
        layer = name.removesuffix(".weight")
        new = stored[layer].dequantise() if layer in stored else tensors.get(name)
        if new is None:
            raise CellError(f"{folder.name} holds no {name}")
        if new.shape != parameter.shape:
            raise CellError(f"{name} is {list(new.shape)} in {folder.name}, {list(parameter.shape)} in the dense model")
        new = new.to(parameter.dtype).to(parameter.device)
        if not torch.equal(new, parameter):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(new, requires_grad=False))
    if pattern is not None:
        for name in linears:
            weight = model.get_submodule(name).weight
            size = packed_bytes(
                weight.shape, bits=8 * weight.element_size(), pattern=pattern, nonzero=int(weight.count_nonzero())
            )
            shape = (weight.shape[0], weight.shape[1])
            stored[name] = StoredLinear(
                name, shape, 8 * weight.element_size(), pattern=pattern, format="pruned", size_bytes=size
            )
    if missing := set(linears) - set(stored):
        raise CellError(f"{len(missing)} layers were not compressed, {sorted(missing)[0]} among them")
    zeros = lambda name: float((model.get_submodule(name).weight == 0).float().mean()) if pattern is not None else None
    # The error column is relative to calibration inputs, which only the other library saw.
    stored = {name: stored[name] for name in linears}
    rows = [layer_row(s, None, zeros(name)) for name, s in stored.items()]
    return totals(model, dense, stored, rows, pruned=pattern is not None)


def _fused(name: str, stored: Mapping[str, StoredLinear]) -> StoredLinear | None:
    """The one layer of Phi-3 and GLM whose halves GPTQModel writes apart; both see one input, so their groups are the same."""
    stem, fused, _ = name.rpartition("gate_up_proj")
    halves: list[Any] = [stored.get(f"{stem}{half}") for half in ("gate_proj", "up_proj")]
    if not fused or None in halves:
        return None
    first, second = halves
    join = lambda field: None if getattr(first, field) is None else torch.cat([getattr(h, field) for h in halves])
    again = 0 if first.group_index is None else element_bytes(second.group_index)
    return replace(
        first, name=name, shape=(first.shape[0] + second.shape[0], first.shape[1]), codes=join("codes"), scale=join("scale"),
        zero=join("zero"), size_bytes=first.size_bytes + second.size_bytes - again,
    )  # fmt: skip


def _scheme(folder: Path) -> dict[str, Any]:
    """The quantization configuration, wherever the library put it."""
    for name in ("config.json", "quantize_config.json", "quant_config.json"):
        path = folder / name
        if path.exists():
            found = json.loads(path.read_text())
            found = found.get("quantization_config") if name == "config.json" else found
            if found:
                return found
    return {}


def _layers(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Iterator[StoredLinear]:
    awq = scheme.get("quant_method") == "awq" or "w_bit" in scheme
    second = scheme.get("checkpoint_format") == "gptq_v2"
    for key in tensors:
        name, _, kind = key.rpartition(".")
        if kind == "weight_packed":
            yield _read_compressed_tensors(name, tensors, scheme)
        elif kind == "qweight" and awq:
            yield _read_awq(name, tensors)
        elif kind == "qweight":
            yield _read_gptq(name, tensors, int(scheme["bits"]), shift=0 if second else 1)


def _read_gptq(name: str, tensors: Mapping[str, Tensor], bits: int, *, shift: int) -> StoredLinear:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    scale_GO, index = tensors[f"{name}.scales"], tensors[f"{name}.g_idx"]
    (G, O), I, middle = scale_GO.shape, len(index), 2 ** (bits - 1)
    codes_IO = unpack_from_int32(tensors[f"{name}.qweight"], bits, torch.Size((I, O)), packed_dim=0).short() + middle
    zero_GO = unpack_from_int32(tensors[f"{name}.qzeros"], bits, torch.Size((G, O))).short() + middle + shift
    return _stored(name, codes_IO.T, scale_GO.T, zero_GO.T, bits, index)


def _read_awq(name: str, tensors: Mapping[str, Tensor]) -> StoredLinear:
    def read(key: str) -> Tensor:
        words = tensors[f"{name}.{key}"].long() & 0xFFFFFFFF
        nibbles = (words[:, :, None] >> torch.arange(0, 32, 4)) & 15
        return nibbles[:, :, _AWQ_INVERSE].reshape(words.shape[0], -1)

    codes_IO = read("qweight")
    scale_GO = tensors[f"{name}.scales"]
    index = torch.arange(len(codes_IO)) // (len(codes_IO) // len(scale_GO))
    return _stored(name, codes_IO.T, scale_GO.T, read("qzeros").T, 4, index)


def _read_compressed_tensors(name: str, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> StoredLinear:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    groups = list(scheme["config_groups"].values())
    if len(groups) != 1:
        raise CellError("compressed-tensors checkpoints with several schemes cannot be read back")
    weights = groups[0]["weights"]
    bits, middle = weights["num_bits"], 2 ** (weights["num_bits"] - 1)
    O, I = (int(n) for n in tensors[f"{name}.weight_shape"])
    scale_OG = tensors[f"{name}.weight_scale"]
    G = scale_OG.shape[1]
    codes_OI = unpack_from_int32(tensors[f"{name}.weight_packed"], bits, torch.Size((O, I))).short() + middle
    zero_OG = torch.full((O, G), middle, dtype=torch.int16)
    if f"{name}.weight_zero_point" in tensors:
        packed = tensors[f"{name}.weight_zero_point"]
        zero_OG = unpack_from_int32(packed, bits, torch.Size((O, G)), packed_dim=0).short() + middle
    return _stored(name, codes_OI, scale_OG, zero_OG, bits, torch.arange(I) // (I // G))


def _stored(name: str, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, bits: int, index: Tensor) -> StoredLinear:
    """One layer in our form: signed codes without zero points where every zero point is the middle."""
    O, I = codes_OI.shape
    G, middle = scale_OG.shape[1], 2 ** (bits - 1)
    symmetric = bool((zero_OG == middle).all())
    codes = (codes_OI - middle).to(torch.int8) if symmetric else codes_OI.to(torch.uint8)
    ordered = torch.equal(index.long(), torch.arange(I) // math.ceil(I / G))
    zero = None if symmetric else zero_OG.to(torch.uint8).contiguous()
    layer = StoredLinear(
        name, (O, I), bits, codes.contiguous(), scale_OG.contiguous(), zero,
        group_size=None if G == 1 else math.ceil(I / G), group_index=None if ordered else index.to(torch.int32), format="int",
    )  # fmt: skip
    size = packed_bytes(layer.shape, bits=bits, pattern=None, nonzero=O * I, quantised=True) + element_bytes(layer.scale)
    size += 0 if zero is None else zero_bytes(zero, bits)
    size += 0 if ordered else element_bytes(layer.group_index)
    return replace(layer, size_bytes=size)
