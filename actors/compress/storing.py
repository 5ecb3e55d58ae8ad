"""From a method's answer to the module's weight, its stored form and the bytes that takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import Compressed, MethodConfig, PruningConfig, Solution, StoredLinear, element_bytes, packed_bytes, zero_bytes
from .bitsandbytes_ import state_dict
from .grid import half_exact
from .structure import Fold, apply_fold, producer_scale


def put(
    linear: nn.Linear, name: str, solution: Solution, config: MethodConfig, rows: slice, format: str
) -> tuple[StoredLinear, float | None]:
    """Give ``linear`` the ``rows`` of ``solution`` as a new weight; what a file of it would hold, and its share of zeros if pruned."""
    W_OI, scale_I = solution.W_OI[rows], solution.input_scale
    divides = hasattr(linear, "input_scale")  # modules that round activations divide their input themselves
    weight = W_OI if scale_I is None or divides else W_OI / scale_I
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype).contiguous(), requires_grad=False)
    if divides:
        linear.input_scale = scale_I
    pattern = config.pattern if isinstance(config, PruningConfig) else None
    bits = getattr(config, "bits", None) or 8 * linear.weight.element_size()
    quantised = solution.codes is not None
    nonzero = int(linear.weight.ne(0).sum()) if pattern else W_OI.numel()
    size = packed_bytes(W_OI.shape, bits=bits, pattern=pattern, nonzero=nonzero, quantised=quantised)
    codes = scale = zero = None
    if quantised:
        codes, scale = solution.codes[rows], solution.scale[rows]
        zero = None if solution.zero is None else solution.zero[rows]
    size += sum(element_bytes(t) for t in (scale, solution.group_index, scale_I) if t is not None)
    size += 0 if zero is None else zero_bytes(zero, bits)
    stored = StoredLinear(
        name,
        tuple(W_OI.shape),
        bits,
        codes,
        scale,
        zero,
        group_size=getattr(config, "group_size", None) if quantised else None,
        group_index=solution.group_index,
        input_scale=scale_I,
        pattern=pattern,
        format=format if quantised else "pruned",
        size_bytes=size,
    )
    return stored, 1 - nonzero / W_OI.numel() if pattern else None


def layer_row(stored: StoredLinear, error: float | None, sparsity: float | None = None) -> dict[str, Any]:
    """A row of table `layers`, without the key. ``bits``: stored bits per weight, everything counted."""
    return {
        "layer": stored.name,
        "error": error,
        "sparsity": sparsity,
        "bits": 8 * stored.size_bytes / (stored.shape[0] * stored.shape[1]),
    }


def fold_scale(
    stored: dict[str, StoredLinear], block: nn.Module, prefix: str, fold: Fold, names: list[str], scale_I: Tensor
) -> None:
    """Move the input scale of the linears ``names`` into what produces their input, so that nothing divides at run time."""
    apply_fold(block, fold, scale_I)
    for name in names:
        linear, now = block.get_submodule(name), stored[prefix + name]
        linear.weight = nn.Parameter(now.dequantise().to(linear.weight.dtype), requires_grad=False)
        if hasattr(linear, "input_scale"):
            linear.input_scale = None
        stored[prefix + name] = replace(now, input_scale=None, size_bytes=now.size_bytes - element_bytes(scale_I))
    producer = stored.get(prefix + fold.producer)
    if producer is not None and producer.codes is not None:
        # A quantised producer (v_proj, up_proj) keeps its codes: only the scales of its rows change.
        scale_OG = half_exact(producer.scale.float() / producer_scale(fold, scale_I)[:, None]).half()
        stored[producer.name] = producer = replace(producer, scale=scale_OG)
        linear = block.get_submodule(fold.producer)
        linear.weight = nn.Parameter(producer.dequantise().to(linear.weight.dtype), requires_grad=False)


def totals(
    model: nn.Module, dense: nn.Module, stored: dict[str, StoredLinear], layers: list[dict[str, Any]], *, pruned: bool
) -> Compressed:
    """Bytes of the whole model: compressed linears as stored, everything else in the dtype it is held in, tied weights once."""
    order = {name: i for i, (name, _) in enumerate(dense.named_modules())}
    layers = sorted(layers, key=lambda row: order[row["layer"]])
    stored = {row["layer"]: stored[row["layer"]] for row in layers}
    layers = [
        layer_row(stored[row["layer"]], row["error"], row["sparsity"]) for row in layers
    ]  # without scales folded away since
    whole, parameters = whole_model(dense)
    replaced = sum(element_bytes(dense.get_submodule(n).weight) for n in stored)
    packed = sum(s.size_bytes for s in stored.values())
    weights = sum(s.shape[0] * s.shape[1] for s in stored.values())
    zeros = sum(
        row["sparsity"] * stored[row["layer"]].shape[0] * stored[row["layer"]].shape[1] for row in layers if row["sparsity"]
    )
    return Compressed(
        model,
        layers,
        stored,
        size_bytes=whole - replaced + packed,
        bits_per_weight=8 * packed / weights if weights else 8 * whole / parameters,
        sparsity_reached=zeros / weights if pruned and weights else None,
        parameters=parameters,
    )


def whole_model(model: nn.Module) -> tuple[int, int]:
    """Bytes and weights of a model as it is held, tied ones once. A layer that came quantised has the bytes of its codes, scales and
    tables, and as many weights as they stand for."""
    unique = {id(p): p for p in model.parameters()}
    size, count = sum(element_bytes(p) for p in unique.values()), sum(p.numel() for p in unique.values())
    modules: list[Any] = list(model.modules())
    for module in modules:
        weight = getattr(module, "weight", None)
        if hasattr(module, "in_features") and (weight is None or weight.element_size() < 2):
            counted = [p for name, p in module.named_parameters(recurse=False) if name != "bias"]
            size += sum(element_bytes(t) for name, t in state_dict(module).items() if name != "bias")
            size -= sum(element_bytes(p) for p in counted)
            count += module.in_features * module.out_features - sum(p.numel() for p in counted)
    return size, count


def moved_to(s: StoredLinear, device: torch.device) -> StoredLinear:
    tensors = {k: getattr(s, k) for k in ("codes", "scale", "zero", "group_index", "input_scale")}
    return replace(s, **{k: t.to(device) for k, t in tensors.items() if t is not None})
