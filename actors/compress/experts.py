"""Mixtures of experts whose experts transformers holds in one tensor: each expert made three linears, which is what methods compress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class View(nn.Linear):
    """A linear on part of a tensor that others hold; made without the initial weights, which take most of the time."""

    def __init__(self, weight_OI: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight_OI.shape
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.register_parameter("bias", None)


class Expert(nn.Module):
    """The three linears of one expert, on views of the tensors that hold all of them."""

    def __init__(self, gate_up_2IH: Tensor, down_HI: Tensor) -> None:
        super().__init__()
        gate, up = gate_up_2IH.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = View(gate), View(up), View(down_HI)


class Experts(nn.Module):
    """Takes the place of transformers' fused experts and computes what its ``grouped_mm`` computes, one expert after the other, or lets
    it compute (``joined``).

    ``all_tokens``: every expert computes every token, and what the router did not ask for counts nothing. Calibration goes this way
    (as llm-compressor's does): no expert is left without tokens, and all experts of a layer read one input.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.num_experts = len(fused.down_proj)
        whole = zip(fused.gate_up_proj.data.unbind(), fused.down_proj.data.unbind(), strict=True)
        for e, (gate_up, down) in enumerate(whole):
            self.add_module(str(e), Expert(gate_up, down))
        del fused.gate_up_proj, fused.down_proj
        self.fused = fused  # for its activation: some models clamp there
        self.all_tokens = False
        self.joined = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` [T, H]; ``top_k_index`` and ``top_k_weights`` [T, K]. Returns [T, H]."""
        if self.all_tokens:
            return self._all_tokens(hidden_states, top_k_index, top_k_weights)
        if self.joined:
            return self.fused(hidden_states, top_k_index, top_k_weights)
        T, K = top_k_index.shape
        asked = top_k_index.reshape(-1)
        counts = torch.bincount(asked, minlength=self.num_experts).tolist()
        parts = []
        for e, pairs in enumerate((order := asked.argsort(stable=True)).split(counts)):
            if len(pairs):
                parts.append(self.expert(e, hidden_states[pairs // K]) * top_k_weights.reshape(-1)[pairs, None])
        out = torch.cat(parts)
        return out[order.argsort()].view(T, K, -1).sum(1).to(hidden_states.dtype)

    def _all_tokens(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total: Any = 0
        for e in range(self.num_experts):
            chosen = top_k_index == e
            weight = (top_k_weights * chosen).sum(-1, keepdim=True)
            # not 0 * out: a token that is foreign to an expert may overflow there
            total = total + torch.where(chosen.any(-1, keepdim=True), self.expert(e, hidden_states) * weight, 0)
        return total.to(hidden_states.dtype)

    def join(self) -> None:
        """Give the fused module its two tensors back, if every linear here is a plain one; ``part`` takes them away."""
        one: list[Any] = [self.get_submodule(str(e)) for e in range(self.num_experts)]
        gate_up, down = [m for e in one for m in (e.gate_proj, e.up_proj)], [e.down_proj for e in one]
        weights = [m.weight for m in gate_up + down]
        plain = all(type(m) is View and "forward" not in vars(m) and not m._forward_pre_hooks for m in gate_up + down)
        if plain and len({(w.dtype, w.device) for w in weights}) == 1 and not weights[0].is_meta:
            self.fused.gate_up_proj = _in_one_tensor(gate_up).unflatten(0, (self.num_experts, 2)).flatten(1, 2)
            self.fused.down_proj = _in_one_tensor(down)
            self.joined = True

    def part(self) -> None:
        if self.joined:
            del self.fused.gate_up_proj, self.fused.down_proj
            self.joined = False

    def expert(self, e: int, x: Tensor) -> Tensor:
        """Expert ``e`` on all rows of ``x``."""
        one: Any = self.get_submodule(str(e))
        return one.down_proj(self.fused._apply_gate(torch.cat([one.gate_proj(x), one.up_proj(x)], -1)))


def _in_one_tensor(linears: list[Any]) -> Tensor:
    """The weights of ``linears``, stacked. They become parts of it, unless they lie so already: no weight is held twice."""
    first = linears[0].weight.data
    parts = [m.weight.data for m in linears]
    places = [(p.untyped_storage().data_ptr(), p.storage_offset(), p.stride()) for p in parts]
    storage, start, stride = places[0]
    if first.is_contiguous() and places == [(storage, start + k * first.numel(), stride) for k in range(len(parts))]:
        return first.as_strided((len(parts), *first.shape), (first.numel(), *stride))
    whole = torch.stack(parts)
    for m, part in zip(linears, whole, strict=True):
        m.weight = nn.Parameter(part, requires_grad=False)
    return whole


def fused_experts(module: Any) -> bool:
    """Whether ``module`` holds a mixture's experts in the two tensors that `Experts` knows: gate over up, outputs first, no biases."""
    usual = {
        "has_gate": True,
        "has_bias": False,
        "has_post_expert_norm": False,
        "is_transposed": False,
        "is_concatenated": True,
    }
    held = dict(module.named_parameters(recurse=False))
    return (
        all(getattr(module, name, None) is value for name, value in usual.items())
        and held.keys() == {"gate_up_proj", "down_proj"}
        and all(p.ndim == 3 and p.is_floating_point() and p.element_size() > 1 for p in held.values())
    )


@torch.no_grad()
def split_experts(model: nn.Module) -> nn.Module:
    """``model``, changed in place: fused experts are linears of their own, in the same memory."""
    for name, module in list(model.named_modules()):
        if fused_experts(module):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Experts(module))
    return model


def has_fused(model: nn.Module) -> bool:
    return any(map(fused_experts, model.modules()))


def mixtures(model: nn.Module) -> dict[str, Experts]:
    """The split mixtures of ``model``, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def routers(block: nn.Module) -> set[int]:
    """``id`` of all modules of ``block`` that choose experts or weigh them: beside the experts, with an output for each of them, or with
    one for all, in no path back to hidden states (a shared expert, attention). They stay dense, as in all libraries: a few kilobytes
    that decide which weights a token meets."""
    found = set()
    for name, experts in mixtures(block).items():
        beside = block.get_submodule(name.rpartition(".")[0])
        for child in (m for m in beside.children() if m is not experts and not _returns(m, experts)):
            for module in child.modules():
                if any(p.ndim == 2 and len(p) in (1, experts.num_experts) for p in module.parameters(recurse=False)):
                    found.add(id(module))
    return found


def _returns(module: nn.Module, experts: Experts) -> bool:
    """Whether ``module`` goes from hidden states to something and back."""
    hidden = experts.get_submodule("0.down_proj").out_features
    linears: list[Any] = [m for m in module.modules() if hasattr(m, "in_features")]  # quantised weights have other shapes
    read, given = {m.in_features for m in linears}, {m.out_features for m in linears}
    return len(linears) > 1 and hidden in read and hidden in given


@contextmanager
def all_tokens(module: nn.Module) -> Iterator[None]:
    """Every expert in ``module`` computes every token meanwhile."""
    found = [m for m in module.modules() if isinstance(m, Experts)]
    before = [m.all_tokens for m in found]
    for m in found:
        m.all_tokens = True
    try:
        yield
    finally:
        for m, value in zip(found, before, strict=True):
            m.all_tokens = value


@contextmanager
def joined(model: nn.Module) -> Iterator[None]:
    """Meanwhile the experts of a layer compute as transformers has them do, all in one call, wherever their linears are plain: those of
    the dense model and of simulated weights, but not bitsandbytes' and not W8A8. ``model`` stays where it is meanwhile."""
    found = [m for m in model.modules() if isinstance(m, Experts)]
    try:
        for m in found:
            m.join()
        yield
    finally:
        for m in found:
            m.part()


def checkpoint_leaves(model: Any) -> dict[str, str]:
    """What the checkpoints of a transformers ``model`` call the three linears of an expert (Mixtral's ``w1``); nothing where they do not
    hold them one by one."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    wanted = {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)}
    found: dict[str, str] = {}
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        for whole, leaves in wanted.items():
            if any(target.endswith(whole) for target in conversion.target_patterns):
                ends = [source.partition("experts.*.")[2].removesuffix(".weight") for source in conversion.source_patterns]
                found |= dict(zip(leaves, ends, strict=False)) if len(ends) == len(leaves) and all(ends) else {}
    return found if len(found) == 3 else {}


def as_in_checkpoints(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with those of split experts as the checkpoints of ``model`` have them: one by one under their names, or stacked."""
    out = dict(tensors)
    leaves = checkpoint_leaves(model) if (found := mixtures(model)) else {}
    for name, mixture in found.items():
        one = [f"{name}.{e}" for e in range(mixture.num_experts)]
        if not leaves:
            gate, up, down = ([out.pop(f"{e}.{leaf}.weight") for e in one] for leaf in ("gate_proj", "up_proj", "down_proj"))
            out[f"{name}.gate_up_proj"] = torch.cat([torch.stack(gate), torch.stack(up)], 1)
            out[f"{name}.down_proj"] = torch.stack(down)
            continue
        for key in [key for key in out if key.startswith(f"{name}.")]:
            e, leaf, kind = key.removeprefix(f"{name}.").split(".", 2)
            out[f"{name}.{e}.{leaves[leaf]}.{kind}"] = out.pop(key)
    return out


def as_in_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back from `as_in_checkpoints`: ``tensors`` of split experts under the names of ``model``."""
    out = dict(tensors)
    leaves = {theirs: ours for ours, theirs in checkpoint_leaves(model).items()} if (found := mixtures(model)) else {}
    for name, mixture in found.items():
        for key in [key for key in out if key.startswith(f"{name}.")]:
            e, _, rest = key.removeprefix(f"{name}.").partition(".")
            leaf, _, kind = rest.partition(".")
            if leaf in leaves:
                out[f"{name}.{e}.{leaves[leaf]}.{kind}"] = out.pop(key)
        if f"{name}.gate_up_proj" in out:
            gates, ups = out.pop(f"{name}.gate_up_proj").chunk(2, 1)
            for leaf, whole in (("gate_proj", gates), ("up_proj", ups)):
                out |= {f"{name}.{e}.{leaf}.weight": whole[e] for e in range(mixture.num_experts)}
        if f"{name}.down_proj" in out:
            whole = out.pop(f"{name}.down_proj")
            out |= {f"{name}.{e}.down_proj.weight": whole[e] for e in range(mixture.num_experts)}
    return out
