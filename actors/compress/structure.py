"""Where a model's blocks and linears are, which linears share an input, and what feeds them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from .experts import all_tokens, routers

SUPPORTED = (
    "decoder-only models whose blocks hold their weights in nn.Linear, such as Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3, "
    "OLMo, SmolLM, StableLM and Granite, and mixtures of experts such as Mixtral, Qwen3-MoE, OLMoE and DeepSeek; not GPT-2 (Conv1D), "
    "state-space models or experts with biases (gpt-oss)"
)


def clone(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer with ``model``."""
    memo: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def text_body(model: nn.Module) -> Any:
    """What turns token ids into hidden states, without the head."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def text_config(model: nn.Module) -> Any:
    """The configuration of `text_body`; None if the model has none."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks. BadInput, listing what is supported, if the model is built otherwise."""
    kind = type(model).__name__
    config, body = text_config(model), text_body(model)
    depth = getattr(config, "num_hidden_layers", None)
    start = next(name for name, module in model.named_modules() if module is body)  # a model with eyes has their blocks before
    found = [
        (f"{start}.{name}" if start else name, module)
        for name, module in body.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and (depth is None or len(module) == depth)
    ]
    if not found:
        raise BadInput(f"{kind} has no list of decoder blocks", where="model", fix=f"Supported: {SUPPORTED}")
    name, blocks = found[0]
    owners: dict[int, str] = {}
    for owner, module in model.named_modules(remove_duplicate=False):  # one block may stand in two places
        for pname, p in module.named_parameters(recurse=False):
            first = owners.setdefault(id(p), f"{owner}.{pname}")
            if first != f"{owner}.{pname}" and (first.startswith(f"{name}.") or owner.startswith(f"{name}.")):
                raise BadInput(
                    f"{kind}: {owner}.{pname} is tied to {first}; compressing one would change the other",
                    where="model",
                    fix="Tied weights are supported outside the decoder blocks (embedding and head) only",
                )
    for i, block in enumerate(blocks):
        choosing = routers(block)
        known = (m for m in block.modules() if isinstance(m, nn.Linear) or id(m) in choosing)
        owned = {id(p) for m in known for p in m.parameters(recurse=False)}
        for pname, p in sorted(block.named_parameters(), key=lambda named: "expert" not in named[0]):
            if p.ndim > 1 and id(p) not in owned:
                why = "fused experts of a mixture" if "expert" in pname else "weights that are not in an nn.Linear"
                raise BadInput(
                    f"{kind}: {name}.{i}.{pname} {list(p.shape)} holds {why}, which would silently stay dense",
                    where="model",
                    fix=f"Supported: {SUPPORTED}",
                )
    if not linears_of(blocks[0]):
        raise BadInput(f"{kind}: {name}.0 holds no nn.Linear", where="model", fix=f"Supported: {SUPPORTED}")
    return name, blocks


def named_linears(prefix: str, blocks: nn.ModuleList) -> dict[str, nn.Linear]:
    """Every linear that a method compresses, by its full name: those inside blocks; embeddings, head and routers stay dense."""
    return {f"{prefix}.{b}.{name}": m for b, block in enumerate(blocks) for name, m in linears_of(block).items()}


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    choosing = routers(block)
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and id(m) not in choosing}


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``; tuples, lists and dicts are walked."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(to_device(v, device) for v in value)
    return {k: to_device(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def to_float32(value: Any) -> Any:
    """``value`` with every tensor of floats in it in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(to_float32(v) for v in value)
    return {k: to_float32(v) for k, v in value.items()} if isinstance(value, dict) else value


def take_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """Rows of every tensor in ``value`` that has one for each of ``batch`` sequences; what is shared by all stays."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == batch and batch > 1 else value
    if isinstance(value, tuple | list):
        return type(value)(take_rows(v, rows, batch) for v in value)
    return {k: take_rows(v, rows, batch) for k, v in value.items()} if isinstance(value, dict) else value


@contextmanager
def on_device(block: nn.Module, device: torch.device, moved: dict[int, nn.Parameter]) -> Iterator[None]:
    """Hold ``block`` on ``device``; afterwards untouched parameters are the originals again and new ones are where those were.

    ``moved`` maps original to copy, so that cells of one pass share the copy.
    """
    home = next(block.parameters()).device
    if home == device:
        yield
        return
    originals: dict[int, nn.Parameter] = {}
    buffers = [(m, n, t) for m in block.modules() for n, t in m._buffers.items() if t is not None]
    for module in block.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if id(p) not in moved:
                    moved[id(p)] = nn.Parameter(p.to(device), requires_grad=False)
                originals[id(moved[id(p)])] = p
                module._parameters[name] = moved[id(p)]
    for module, name, t in buffers:
        module._buffers[name] = t.to(device)
    try:
        yield
    finally:
        for module in block.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = originals[id(p)] if id(p) in originals else _moved_back(p, home)
        for module, name, t in buffers:
            if name in module._buffers:
                module._buffers[name] = t


def _moved_back(p: nn.Parameter, home: torch.device) -> nn.Parameter:
    # bitsandbytes parameters carry their quantisation state and know how to move it
    return p.to(home) if type(p) is not nn.Parameter else nn.Parameter(p.to(home), requires_grad=False)


class Stop(Exception):
    """Ends a forward pass early: what was asked for is known."""


@dataclass
class Fold:
    """How an input scale s can vanish: divide what produces the input by s."""

    producer: str  # module in the block
    kind: str  # 'norm', 'norm+1' (weight stored as weight - 1, as Gemma does), 'linear'
    repeat: int = 1  # input channels per producer channel (grouped-query attention), in runs of `head_dim`
    head_dim: int = 0
    readers: tuple[str, ...] = ()  # routers, which stay dense and read the input too: their weights are multiplied by s


@dataclass
class Group:
    """Linears of a block that read the same input, in the order they run."""

    linears: list[str]
    fold: Fold | None = None


@dataclass
class Walk:
    """What a short dry run through the model showed."""

    groups: dict[tuple, list[Group]] = field(default_factory=dict)  # by structure of the block

    def of(self, block: nn.Module) -> list[Group]:
        return self.groups[signature(block)]


def signature(block: nn.Module) -> tuple:
    return (type(block), *((n, m.in_features, m.out_features) for n, m in linears_of(block).items()))


def record(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, visit: Callable | None = None) -> tuple[Tensor, list[dict]]:
    """Run ``model`` on ``tokens`` [B, T] with every block replaced by the identity.

    Returns the input of the first block and, for every block, the keyword arguments the model calls it with (masks, rotary
    embeddings; these may differ between blocks). ``visit(block, forward, hidden, kwargs)`` is called in place of each block.
    ``model`` must be a clone: the forward of its blocks is swapped while this runs.
    """
    first: list[Tensor] = []
    arguments: list[dict] = []

    def stand_in(block: nn.Module, forward: Callable):
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                raise BadInput(
                    f"{type(block).__name__} takes positional arguments", where="model", fix=f"Supported: {SUPPORTED}"
                )
            if not first:
                first.append(hidden)
            arguments.append(kwargs)
            if visit is not None:
                visit(block, forward, hidden, kwargs)
            return hidden

        return run

    originals = [block.forward for block in blocks]
    body = text_body(model)
    try:
        for block, forward in zip(blocks, originals, strict=True):
            block.forward = stand_in(block, forward)
        body(input_ids=tokens, use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    return first[0], arguments


def discover(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, *, folds: bool) -> Walk:
    """Find the groups of every kind of block by a dry run on a few ``tokens``; with ``folds`` also where scales can be folded.

    A fold is a guess (a norm whose output is the input; v_proj before o_proj; up_proj before down_proj) that is then tried on
    numbers: scaled by random factors, the block must give the same output, else the group has no fold.
    """
    walk = Walk()
    config = text_config(model)

    def visit(block: nn.Module, forward: Callable, hidden: Tensor, kwargs: dict) -> None:
        key = signature(block)
        if key in walk.groups:
            return
        seen: dict[tuple, Group] = {}
        made: dict[tuple, str] = {}
        reading: dict[tuple, list[str]] = {}
        alive: list[Tensor] = []  # an address names a tensor only as long as it lives

        def place(x: Tensor) -> tuple:
            # The cdata of its storage: tensors without numbers have no data_ptr. Experts read [B T, I] of a [B, T, I].
            alive.append(x)
            return (x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x.shape[-1])

        def before(name: str):
            return lambda _, args: seen.setdefault(place(args[0]), Group([])).linears.append(name)

        def after(name: str):
            return lambda _, args, out: made.__setitem__(place(out), name) if isinstance(out, Tensor) else None

        def read(name: str):
            return lambda m, args: (
                reading.setdefault(place(args[0]), []).append(name) if args and hasattr(m, "weight") else None
            )

        linears, choosing = linears_of(block), routers(block)
        hooks = [m.register_forward_pre_hook(before(n)) for n, m in linears.items()]
        hooks += [
            m.register_forward_hook(after(n))
            for n, m in block.named_modules()
            if n not in linears and isinstance(getattr(m, "weight", None), Tensor) and m.weight.ndim == 1
        ]
        hooks += [m.register_forward_pre_hook(read(n)) for n, m in block.named_modules() if id(m) in choosing]
        with all_tokens(block):
            out = forward(hidden, **kwargs)
        for hook in hooks:
            hook.remove()
        if not isinstance(out, Tensor):
            raise BadInput(f"{type(block).__name__} returns {type(out).__name__}", where="model", fix=f"Supported: {SUPPORTED}")
        groups = list(seen.values())
        reached = [n for g in groups for n in g.linears]
        if missing := set(linears) - set(reached):
            raise BadInput(
                f"{sorted(missing)[0]} gets no tokens in a plain forward pass",
                where="model",
                fix=f"Supported: {SUPPORTED}",
            )
        if len(reached) != len(set(reached)):
            raise BadInput("a linear layer runs twice in one block", where="model", fix=f"Supported: {SUPPORTED}")
        if folds:
            # In 16 bits the wrong one of two guesses may pass: of Gemma's norm weights - 1 those far above 1 are nearly the weights.
            exact, inputs, more = copy.deepcopy(block).float(), hidden.float(), to_float32(kwargs)
            with all_tokens(exact):
                out = type(block).forward(exact, inputs, **more)
                for place_, group in seen.items():
                    readers = tuple(reading.get(place_, ()))
                    group.fold = _find_fold(exact, group, made.get(place_), readers, inputs, more, out, config)
        walk.groups[key] = groups

    with torch.no_grad():
        record(model, blocks, tokens, visit)
    return walk


_FEEDS = {"o_proj": "v_proj", "down_proj": "up_proj"}


def _find_fold(block, group, norm, readers, hidden, kwargs, out, config) -> Fold | None:
    guesses: list[Fold] = []
    if norm is not None:
        guesses = [Fold(norm, "norm", readers=readers), Fold(norm, "norm+1", readers=readers)]
    elif len(group.linears) == 1:
        parent, _, leaf = group.linears[0].rpartition(".")
        producer = f"{parent}.{_FEEDS.get(leaf, '')}"
        linears = linears_of(block)
        if producer in linears:
            inputs, rows = linears[group.linears[0]].in_features, linears[producer].out_features
            if inputs == rows:
                guesses = [Fold(producer, "linear")]
            elif inputs % rows == 0:  # the width of a head is the module's own: Gemma 4 has two of them
                head_dim = getattr(block.get_submodule(parent), "head_dim", None) or inputs // config.num_attention_heads
                guesses = [Fold(producer, "linear", repeat=inputs // rows, head_dim=head_dim)]
    generator = torch.Generator().manual_seed(0)
    for fold in guesses:
        inputs = block.get_submodule(group.linears[0]).in_features
        scale = share_heads(torch.rand(inputs, generator=generator) + 0.5, fold).to(hidden.device)
        trial = clone(block)
        for name in group.linears:
            linear: Any = trial.get_submodule(name)
            linear.weight = nn.Parameter(linear.weight * scale, requires_grad=False)
        apply_fold(trial, fold, scale)
        again = type(block).forward(trial, hidden, **kwargs)
        if (again - out).norm() <= 1e-4 * (out - hidden).norm():
            return fold
    return None


def share_heads(scale_I: Tensor, fold: Fold) -> Tensor:
    """``scale_I`` made equal (geometric mean) over the query heads that read one value head, so that it folds into that."""
    if fold.repeat == 1:
        return scale_I
    heads = scale_I.view(-1, fold.repeat, fold.head_dim)
    return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1)


def producer_scale(fold: Fold, scale_I: Tensor) -> Tensor:
    """``scale_I`` per channel of the producer, where several inputs come from one channel."""
    return scale_I if fold.repeat == 1 else scale_I.view(-1, fold.repeat, fold.head_dim)[:, 0].reshape(-1)


def apply_fold(block: nn.Module, fold: Fold, scale_I: Tensor) -> None:
    """Divide the output of the producer by ``scale_I``, and multiply the weights of its dense readers, on new parameters."""
    module: Any = block.get_submodule(fold.producer)
    dtype, scale = module.weight.dtype, producer_scale(fold, scale_I)
    if fold.kind == "linear":
        weight = module.weight.float() / scale[:, None]
    else:
        one = 1.0 if fold.kind == "norm+1" else 0.0
        weight = (module.weight.float() + one) / scale - one
    module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter((module.bias.float() / scale).to(dtype), requires_grad=False)
    for name in fold.readers:
        reader: Any = block.get_submodule(name)
        reader.weight = nn.Parameter((reader.weight.float() * scale_I).to(reader.weight.dtype), requires_grad=False)
