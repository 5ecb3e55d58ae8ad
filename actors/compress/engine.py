"""The block-wise engine: one forward over the decoder, one block on the device at a time, several cells in one pass.

The calibration batch goes through each block once. A hook on the first linear of every group that shares an input sees all of it,
gathers what the method asks for and compresses the group before it runs, so that what follows already sees compressed inputs
(true-sequential order, without a second forward). Where the batch does not fit, the block runs chunk by chunk up to each group
in turn, with the same result up to the order of sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, CellError
from . import bitsandbytes_
from .base import (
    Compressed,
    Inputs,
    MethodConfig,
    MethodSpec,
    Progress,
    PruningConfig,
    Solution,
    StoredLinear,
    element_bytes,
    packed_bytes,
)
from .grid import half_exact
from .statistics import Statistics
from .structure import Group, Stop, Walk, apply_fold, clone, decoder_blocks, discover, linears_of, on_device, record, to_device

#: Calibration activations of one block held at once; a constant, so that a rerun on the same machine splits the same way.
CPU_BUDGET = 4 * 2**30
GPU_SHARE = 0.4


@dataclass
class _Cell:
    spec: MethodSpec
    config: MethodConfig
    model: nn.Module
    blocks: nn.ModuleList
    hidden: list[Tensor] = field(default_factory=list)  # a chunk each
    context: Any = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, StoredLinear] = field(default_factory=dict)
    zeros: int = 0
    seconds: float = 0.0

    @property
    def calibrated(self) -> bool:
        return self.spec.needs_calibration

    @contextmanager
    def clock(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def run(
    model: nn.Module,
    cells: Sequence[tuple[MethodSpec, MethodConfig]],
    tokens: Tensor | None,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
    chunk_tokens: int | None = None,
) -> list[Compressed]:
    """Compress ``model`` once for each of ``cells``; configurations are taken as valid. See `comptrust.actors.compress.compress`."""
    start = time.perf_counter()
    prefix, dense_blocks = decoder_blocks(model)
    widest = max(m.in_features for b in dense_blocks for m in linears_of(b).values())
    work = []
    for spec, config in cells:
        if spec.needs_calibration:
            check_tokens(spec, config, tokens, widest)
        copy = model if spec.name == "dense" else clone(model).eval()
        blocks = copy.get_submodule(prefix)
        work.append(_Cell(spec, config, copy, blocks))
        for name, linear in _named(prefix, dense_blocks):
            layer = config.for_layer(name)
            if layer is not None and (why := layer.impossible() or layer.misfit(name, linear.in_features)):
                raise BadInput(f"{spec.name}: {why}", where="params")
    active = [c for c in work if c.spec.name != "dense"]
    home = next(dense_blocks.parameters()).device
    device = device if device is not None else home
    with torch.no_grad():
        linears = dict(_named(prefix, dense_blocks))
        for cell in active:
            if cell.spec.prepare:
                with cell.clock(), torch.enable_grad():
                    cell.context = cell.spec.prepare(
                        model, {n: m for n, m in linears.items() if cell.config.for_layer(n)}, cell.config,
                        tokens=tokens, device=device, progress=progress,
                    )  # fmt: skip
        calibrated = [c for c in active if c.calibrated]
        arguments: list[list[dict]] = []
        walk = Walk()
        if calibrated:
            shell = clone(model).eval()
            shell_blocks = shell.get_submodule(prefix)
            tokens = tokens.to(next(model.parameters()).device)
            walk = discover(shell, shell_blocks, tokens[:1, :8], folds=any(c.spec.folds for c in calibrated))
            chunks = list(tokens.split(_chunk_rows(dense_blocks[0], tokens, device, chunk_tokens)))
            first = []
            for chunk in chunks:
                hidden, kwargs = record(shell, shell_blocks, chunk)
                first.append(hidden.to(device if len(chunks) == 1 else home))
                arguments.append(kwargs)
            for cell in calibrated:
                cell.hidden = list(first)
            del first
        for b in range(len(dense_blocks)):
            shared: dict[Any, Statistics] = {}
            moved: dict[int, nn.Parameter] = {}
            for cell in active:
                with cell.clock(), on_device(cell.blocks[b], device, moved):
                    name = f"{prefix}.{b}."
                    if cell.calibrated:
                        kwargs = [to_device(a[b], device) for a in arguments]
                        _calibrated_block(cell, b, name, walk, kwargs, shared if b == 0 else {}, device)
                    else:
                        _weights_only_block(cell, cell.blocks[b], name)
            if progress:
                progress("compress", b + 1, len(dense_blocks))
    common = time.perf_counter() - start - sum(c.seconds for c in active)
    out = []
    for cell in work:
        done = _totals(cell, model)
        done.seconds = cell.seconds + (common / len(active) if cell in active else 0.0)
        out.append(done)
    return out


def check_tokens(spec: MethodSpec, config: MethodConfig, tokens: Tensor | None, widest: int) -> None:
    """BadInput if ``spec`` cannot work with these calibration tokens: none, the wrong shape or type, or too few."""
    if tokens is None:
        raise BadInput(f"{spec.name} needs calibration tokens", where="calibration", fix="Give token ids [samples, seqlen]")
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise BadInput(
            f"calibration tokens are {tokens.dtype} {list(tokens.shape)}",
            where="calibration",
            fix="Give int64 token ids [samples, seqlen]",
        )
    need = spec.min_tokens(config, widest)
    if tokens.numel() < need:
        raise BadInput(
            f"{spec.name} builds a {widest} x {widest} Hessian from {tokens.numel()} calibration tokens and needs at least {need}",
            where="calibration",
            fix=f"Raise samples to {-(-need // tokens.shape[1])} at this sequence length",
        )


def _named(prefix: str, blocks: nn.ModuleList) -> Iterator[tuple[str, nn.Linear]]:
    for b, block in enumerate(blocks):
        for name, linear in linears_of(block).items():
            yield f"{prefix}.{b}.{name}", linear


def _chunk_rows(block: nn.Module, tokens: Tensor, device: torch.device, chunk_tokens: int | None) -> int:
    """Sequences of ``tokens`` whose activations in one block fit the budget."""
    if chunk_tokens is None:
        widths = [m.in_features + m.out_features for m in linears_of(block).values()]
        size = next(block.parameters()).element_size()
        a_token = sum(widths) * size + 8 * max(widths)  # what the block keeps, and a float32 copy of the widest input
        budget = CPU_BUDGET if device.type == "cpu" else GPU_SHARE * torch.cuda.get_device_properties(device).total_memory
        chunk_tokens = int(budget // a_token)
    return max(1, chunk_tokens // tokens.shape[1])


def _weights_only_block(cell: _Cell, block: nn.Module, prefix: str) -> None:
    for name, linear in linears_of(block).items():
        config = cell.config.for_layer(prefix + name)
        if config is None:
            continue
        if cell.spec.solve is None:
            module = cell.spec.replace(linear, config)
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, module)
            cell.stored[prefix + name] = stored = bitsandbytes_.stored(prefix + name, module, config)
            _row(cell, stored, bitsandbytes_.weight_error(linear.weight, module))
            continue
        W_OI = linear.weight.float()
        inputs = Inputs([prefix + name], [linear.out_features], context=cell.context)
        solution = cell.spec.solve(W_OI, inputs, config)
        _put(
            cell, linear, prefix + name, solution, config, slice(None), error=float((W_OI - solution.W_OI).norm() / W_OI.norm())
        )


def _calibrated_block(
    cell: _Cell, b: int, prefix: str, walk: Walk, kwargs: list[dict], shared: dict[Any, Statistics], device: torch.device
) -> None:
    block = cell.blocks[b]
    groups = walk.of(block)
    last = b == len(cell.blocks) - 1
    if cell.spec.replace:
        for name, linear in linears_of(block).items():
            if (config := cell.config.for_layer(prefix + name)) is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, cell.spec.replace(linear, config))
    folds: list[tuple[Group, list[tuple[str, Solution]], Tensor]] = []

    def solve(k: int, X_chunks: Sequence[Tensor]) -> None:
        folds.extend(_solve_group(cell, block, prefix, groups[k], X_chunks, shared if k == 0 else {}))

    def forward(i: int, stop_at: int | None, seen: Callable[[int, Tensor], None]) -> Tensor | None:
        """Chunk ``i`` through the block; ``seen`` at every group (or only at ``stop_at``, which ends it)."""

        def hook(k: int) -> Callable:
            def call(_: nn.Module, args: tuple) -> None:
                seen(k, args[0])
                if k == stop_at:
                    raise Stop

            return call

        at = range(len(groups)) if stop_at is None or len(kwargs) == 1 else [stop_at]
        hooks = [block.get_submodule(groups[k].linears[0]).register_forward_pre_hook(hook(k)) for k in at]
        try:
            return block(cell.hidden[i].to(device), **kwargs[i])
        except Stop:
            return None
        finally:
            for h in hooks:
                h.remove()

    if len(kwargs) == 1:
        # After the last group of the last block nothing more is needed.
        out = forward(0, len(groups) - 1 if last else None, lambda k, X: solve(k, [X]))
        cell.hidden = [] if out is None else [out]
    else:
        for k in range(len(groups)):
            # The inputs of one group are gathered chunk by chunk; only their statistics stay.
            _solve_streamed(
                cell,
                block,
                prefix,
                groups[k],
                shared if k == 0 else {},
                folds,
                len(kwargs),
                lambda i, see, k=k: forward(i, k, see),
            )
        if not last:
            for i in range(len(kwargs)):
                cell.hidden[i] = forward(i, None, lambda k, X: None).to(cell.hidden[i].device)
    for group, solutions, scale_I in folds:
        _fold(cell, block, prefix, group, solutions, scale_I)


def _statistics_of(
    cell: _Cell, prefix: str, group: Group
) -> tuple[list[tuple[MethodConfig, list[str]]], dict[Any, Statistics]]:
    """The linears of ``group`` by the parameters that hold for them, and an empty accumulator for each set asked for."""
    parts: list[tuple[MethodConfig, list[str]]] = []
    for name in group.linears:
        config = cell.config.for_layer(prefix + name)
        if config is None:
            continue
        for known, names in parts:
            if known == config:
                names.append(name)
                break
        else:
            parts.append((config, [name]))
    accumulators = {}
    for config, _ in parts:
        wanted, clip = cell.spec.statistics(config), getattr(config, "token_clip", None)
        accumulators[(frozenset(wanted), clip)] = Statistics(prefix + group.linears[0], wanted, clip)
    return parts, accumulators


def _solve_group(cell, block, prefix, group, X_chunks, shared):
    parts, accumulators = _statistics_of(cell, prefix, group)
    for key, accumulator in accumulators.items():
        if key in shared:
            accumulators[key] = shared[key]
        else:
            for X in X_chunks:
                accumulator.add(X)
            shared[key] = accumulator
    return _solve_parts(cell, block, prefix, group, parts, accumulators)


def _solve_streamed(cell, block, prefix, group, shared, folds, chunks, run_chunk) -> None:
    parts, accumulators = _statistics_of(cell, prefix, group)
    todo = {k: a for k, a in accumulators.items() if k not in shared}
    if todo:
        for i in range(chunks):
            run_chunk(i, lambda k, X: [a.add(X) for a in todo.values()])
    shared.update(todo)
    folds.extend(_solve_parts(cell, block, prefix, group, parts, {k: shared[k] for k in accumulators}))


def _solve_parts(cell, block, prefix, group, parts, accumulators):
    folds = []
    for config, names in parts:
        linears = [block.get_submodule(n) for n in names]
        key = (frozenset(cell.spec.statistics(config)), getattr(config, "token_clip", None))
        values = accumulators[key].finish()
        fold = group.fold if len(names) == len(group.linears) else None  # a scale folds only if all readers share it
        inputs = Inputs(
            [prefix + n for n in names], [m.out_features for m in linears], tokens=accumulators[key].tokens, context=cell.context,
            fold=fold, **values,
        )  # fmt: skip
        W_OI = torch.cat([m.weight for m in linears]).float()
        solution = cell.spec.solve(W_OI, inputs, config)
        effective = solution.W_OI if solution.input_scale is None else solution.W_OI / solution.input_scale
        if not bool(torch.isfinite(effective.sum())):
            raise CellError(f"{prefix}{names[0]}: {cell.spec.name} gave weights that are not finite")
        pieces = []
        low = 0
        for name, linear in zip(names, linears, strict=True):
            rows = slice(low, low + linear.out_features)
            low = rows.stop
            dense_RK = W_OI[rows] @ inputs.sketch
            error = ((W_OI[rows] - effective[rows]) @ inputs.sketch).norm() / dense_RK.norm().clamp_min(1e-30)
            _put(cell, linear, prefix + name, solution, config, rows, error=float(error))
            pieces.append(name)
        if solution.input_scale is not None and fold is not None:
            folds.append((group, pieces, solution.input_scale))
    return folds


def _put(
    cell: _Cell, linear: nn.Linear, name: str, solution: Solution, config: MethodConfig, rows: slice, *, error: float
) -> None:
    """New weight for ``linear``, and its stored form and layer row."""
    W_OI = solution.W_OI[rows]
    scale_I = solution.input_scale
    dtype = linear.weight.dtype
    runtime_scale = hasattr(linear, "input_scale")  # modules that quantise activations divide their input themselves
    weight = W_OI if scale_I is None or runtime_scale else W_OI / scale_I
    linear.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if runtime_scale:
        linear.input_scale = scale_I
    pruned = config.pattern if isinstance(config, PruningConfig) else None
    bits = getattr(config, "bits", None)
    value_bits = bits or 8 * linear.weight.element_size()
    nonzero = int(torch.count_nonzero(linear.weight)) if pruned else W_OI.numel()
    size = packed_bytes(W_OI.shape, bits=value_bits, pattern=pruned, nonzero=nonzero, quantised=solution.codes is not None)
    codes = scale = zero = None
    if solution.codes is not None:
        codes, scale = solution.codes[rows], solution.scale[rows]
        zero = None if solution.zero is None else solution.zero[rows]
        size += 2 * scale.numel() + (0 if zero is None else zero.numel())
        size += 0 if solution.group_index is None else element_bytes(solution.group_index)
    stored = StoredLinear(
        name, tuple(W_OI.shape), value_bits, codes, scale, zero,
        group_size=getattr(config, "group_size", None) if codes is not None else None,
        group_index=solution.group_index, input_scale=scale_I, pattern=pruned,
        format=cell.spec.format if codes is not None or not pruned else "pruned",
        size_bytes=size + (0 if scale_I is None else element_bytes(scale_I)),
    )  # fmt: skip
    cell.stored[name] = stored
    if pruned:
        cell.zeros += W_OI.numel() - nonzero
    _row(cell, stored, error, sparsity=1 - nonzero / W_OI.numel() if pruned else None)


def _row(cell: _Cell, stored: StoredLinear, error: float, sparsity: float | None = None) -> None:
    weights = stored.shape[0] * stored.shape[1]
    cell.layers.append({"layer": stored.name, "error": error, "sparsity": sparsity, "bits": 8 * stored.size_bytes / weights})


def _fold(cell: _Cell, block: nn.Module, prefix: str, group: Group, names: list[str], scale_I: Tensor) -> None:
    """Move the input scale of ``names`` into what produces their input, so that nothing divides at run time."""
    apply_fold(block, group.fold, scale_I)
    for name in names:
        linear, stored = block.get_submodule(name), cell.stored[prefix + name]
        linear.weight = nn.Parameter(stored.dequantise().to(linear.weight.dtype), requires_grad=False)
        if hasattr(linear, "input_scale"):
            linear.input_scale = None
        cell.stored[prefix + name] = replace(stored, input_scale=None, size_bytes=stored.size_bytes - element_bytes(scale_I))
    producer = cell.stored.get(prefix + group.fold.producer)
    if producer is not None and producer.codes is not None:
        # A quantised producer (v_proj, up_proj) keeps its codes: only the scales of its rows change.
        s = scale_I if group.fold.repeat == 1 else scale_I.view(-1, group.fold.repeat, group.fold.head_dim)[:, 0].reshape(-1)
        producer = replace(producer, scale=half_exact(producer.scale.float() / s[:, None]).half())
        cell.stored[producer.name] = producer
        linear = block.get_submodule(group.fold.producer)
        linear.weight = nn.Parameter(producer.dequantise().to(linear.weight.dtype), requires_grad=False)


def _totals(cell: _Cell, dense: nn.Module) -> Compressed:
    """Bytes of the whole model: compressed linears as stored, everything else in the dtype it is held in, tied weights once."""
    unique = {id(p): p for p in dense.parameters()}
    whole = sum(element_bytes(p) for p in unique.values())
    parameters = sum(p.numel() for p in unique.values())
    replaced = sum(element_bytes(dense.get_submodule(n).weight) for n in cell.stored)
    stored = sum(s.size_bytes for s in cell.stored.values())
    weights = sum(s.shape[0] * s.shape[1] for s in cell.stored.values())
    size = whole - replaced + stored
    home = next(dense.parameters()).device
    for name, s in cell.stored.items():
        cell.stored[name] = s if s.codes is None else _home(s, home)
    return Compressed(
        cell.model, cell.layers, cell.stored, size_bytes=size, parameters=parameters,
        bits_per_weight=8 * stored / weights if weights else 8 * whole / parameters,
        sparsity_reached=cell.zeros / weights if isinstance(cell.config, PruningConfig) and weights else None,
    )  # fmt: skip


def _home(s: StoredLinear, device: torch.device) -> StoredLinear:
    tensors = {k: getattr(s, k) for k in ("codes", "scale", "zero", "group_index", "input_scale")}
    return replace(s, **{k: None if t is None else t.to(device) for k, t in tensors.items()})
