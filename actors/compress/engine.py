"""The block-wise engine: one forward over the decoder, one block on the device at a time, several cells in one pass.

The calibration batch goes through each block once. A hook on the first linear of every group that shares an input sees all of
it, gathers what the method asks for and compresses the group before it runs, so that what follows already sees compressed
inputs (true-sequential order, without a second forward). Where the batch does not fit, the block runs chunk by chunk up to each
group in turn, with the same result up to the order of sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, CellError
from . import bitsandbytes_
from .base import Compressed, Inputs, MethodConfig, MethodSpec, Progress, PruningConfig, Solution, StoredLinear
from .experts import all_tokens, has_fused, mixtures, split_experts
from .statistics import Statistics
from .storing import fold_scale, layer_row, moved_to, put, totals
from .structure import (
    Group,
    Stop,
    Walk,
    clone,
    decoder_blocks,
    discover,
    linears_of,
    named_linears,
    on_device,
    record,
    take_rows,
    text_config,
    to_device,
)

#: Calibration activations of one block held at once; a constant, so that a rerun on the same machine splits the same way.
CPU_BUDGET = 4 * 2**30
GPU_SHARE = 0.4
HESSIANS = 2 * 2**30  # bytes of the 4 I^2 each that experts take whose inputs are gathered together; one expert at least
#: What decides which statistics a set of linears can share: their names and the token clip.
Key = tuple[frozenset[str], float | None]


@dataclass
class Cell:
    """One compression under way."""

    spec: MethodSpec
    config: MethodConfig
    model: nn.Module
    blocks: nn.ModuleList
    hidden: list[Tensor] = field(default_factory=list)  # input of the next block, a chunk each
    context: Any = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, StoredLinear] = field(default_factory=dict)
    seconds: float = 0.0

    @contextmanager
    def clock(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


@torch.no_grad()
def run(
    model: nn.Module,
    specs: Sequence[tuple[MethodSpec, MethodConfig]],
    tokens: Tensor | None,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
    chunk_tokens: int | None = None,
) -> list[Compressed]:
    """Compress ``model`` once for each of ``specs``, whose parameters are valid in themselves. See `compress.compress_many`."""
    start = time.perf_counter()
    if has_fused(model):
        model = split_experts(clone(model))
    prefix, blocks = decoder_blocks(model)
    linears = named_linears(prefix, blocks)
    for spec, config in specs:
        check_fit(spec, config, linears, tokens)
    if tokens is not None and any(spec.needs_calibration for spec, _ in specs):
        check_ids(model, tokens)
    cells = []
    for spec, config in specs:
        copy = model if spec.name == "dense" else clone(model).eval()
        cells.append(Cell(spec, config, copy, copy.get_submodule(prefix)))
    active = [c for c in cells if c.spec.name != "dense"]
    places = [device or next(block.parameters()).device for block in blocks]  # a spread model's blocks: where each is
    for cell in active:
        if cell.spec.prepare:
            chosen = {n: m for n, m in linears.items() if cell.config.for_layer(n)}
            with cell.clock(), torch.enable_grad():
                cell.context = cell.spec.prepare(model, chosen, cell.config, tokens=tokens, places=places, progress=progress)
    calibrated = [c for c in active if c.spec.needs_calibration]
    walk, arguments = Walk(), []
    if calibrated:
        walk, first, arguments = _capture(model, prefix, tokens, calibrated, places, chunk_tokens)
        for cell in calibrated:
            cell.hidden = list(first)
        del first
    for b in range(len(blocks)):
        shared: dict[Key, Statistics] = {}  # cells enter the first block with the same inputs
        moved: dict[int, nn.Parameter] = {}
        for cell in active:
            with cell.clock(), on_device(cell.blocks[b], places[b], moved):
                name = f"{prefix}.{b}."
                if cell in calibrated:
                    groups = walk.of(cell.blocks[b])
                    kwargs = [to_device(a[b], places[b]) for a in arguments]
                    step = BlockPass(cell, cell.blocks[b], name, groups, kwargs, places[b], shared if b == 0 else {})
                    step.run(last=b == len(blocks) - 1)
                else:
                    _weights_only(cell, cell.blocks[b], name)
            home = next(cell.blocks[b].parameters()).device
            cell.stored |= {n: moved_to(s, home) for n, s in cell.stored.items() if n.startswith(name)}
        if progress:
            progress("compress", b + 1, len(blocks))
    common = time.perf_counter() - start - sum(c.seconds for c in active)
    out = []
    for cell in cells:
        done = totals(cell.model, model, cell.stored, cell.layers, pruned=isinstance(cell.config, PruningConfig))
        done.seconds = cell.seconds + common / len(cells)
        out.append(done)
    return out


def check_fit(spec: MethodSpec, config: MethodConfig, linears: dict[str, nn.Linear], tokens: Tensor | None) -> None:
    """BadInput if ``config`` does not fit these linears, or the tokens are none, of the wrong shape or type, or too few."""
    for name, linear in linears.items():
        if spec.name != "dense" and (not hasattr(linear, "weight") or linear.weight.element_size() < 2):
            raise BadInput(f"{name} is quantised already", where="model", fix="Give the dense model it was made from")
    inputs = {name: linear.in_features for name, linear in linears.items()}
    if why := config.unfit(inputs):
        raise BadInput(f"{spec.name}: {why}", where="params")
    if not spec.needs_calibration:
        return
    form = "Give int64 token ids [samples, seqlen]"
    if tokens is None:
        raise BadInput(f"{spec.name} needs calibration tokens", where="calibration", fix=form)
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise BadInput(f"calibration tokens are {tokens.dtype} {list(tokens.shape)}", where="calibration", fix=form)
    need = spec.least_tokens(config, inputs)
    if (have := tokens.numel()) < need:
        raise BadInput(
            f"{spec.name} builds a {need} x {need} Hessian: it needs {need} calibration tokens or more, not {have}",
            where="calibration",
            fix=f"Raise samples to {-(-need // tokens.shape[1])} at this sequence length",
        )


def check_ids(model: Any, tokens: Tensor) -> None:
    """BadInput for token ids the model has no embedding of, which would end the process on a GPU, and windows beyond its context."""
    embedding, (low, high) = model.get_input_embeddings(), (int(t) for t in tokens.aminmax())
    if low < 0 or high >= embedding.num_embeddings:
        raise BadInput(
            f"calibration tokens hold ids from {low} to {high}, the model knows 0 to {embedding.num_embeddings - 1}",
            where="calibration",
            fix="Tokenise the text with this model's tokenizer",
        )
    check_windows(tokens.shape[1], text_config(model))


def check_windows(length: int, config: Any, *, where: str = "calibration.seqlen") -> None:
    """BadInput for calibration windows of ``length`` tokens beyond the context of a model with this (text) configuration."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and length > positions:
        raise BadInput(
            f"windows of {length} tokens, the model reads {positions} at most", where=where, fix=f"Lower it to {positions}"
        )


def _capture(
    model: nn.Module, prefix: str, tokens: Tensor, cells: list[Cell], places: list[torch.device], chunk_tokens: int | None
) -> tuple[Walk, list[Tensor], list[list[dict]]]:
    """Groups of each block; the first block's inputs and every block's keyword arguments, by chunk of the calibration set."""
    shell = clone(model).eval()
    blocks = shell.get_submodule(prefix)
    home = next(blocks.parameters()).device
    tokens = tokens.to(next(model.parameters()).device)
    walk = discover(shell, blocks, tokens[:1, :8], folds=any(c.spec.folds for c in cells))
    chunks = tokens.split(_chunk_rows(model, blocks[0], tokens, places, chunk_tokens))
    first, arguments = [], []
    for chunk in chunks:
        hidden, kwargs = record(shell, blocks, chunk)
        first.append(hidden.to(places[0] if len(chunks) == 1 else home))
        arguments.append(kwargs)
    return walk, first, arguments


def _chunk_rows(
    model: nn.Module, block: nn.Module, tokens: Tensor, places: list[torch.device], chunk_tokens: int | None
) -> int:
    """Sequences of ``tokens`` whose activations in one block fit the budget."""
    if chunk_tokens is None:
        # Of experts one runs at a time.
        others = tuple(f"{mixture}.{e}." for mixture, m in mixtures(block).items() for e in range(1, m.num_experts))
        widths = [m.in_features + m.out_features for n, m in linears_of(block).items() if not n.startswith(others)]
        size = next(block.parameters()).element_size()
        a_token = sum(widths) * size + 8 * max(widths)  # what the block keeps, and a float32 copy of the widest input
        chunk_tokens = int(min(_budget(model, device) for device in set(places)) // a_token)
    return max(1, chunk_tokens // tokens.shape[1])


def _budget(model: nn.Module, device: torch.device) -> float:
    """Bytes for activations. What lies on the GPU for good is not to be had: the model there, its compressed copy, the copy's codes."""
    if device.type == "cpu":
        return CPU_BUDGET
    there = sum(2 * p.nbytes + p.numel() for p in model.parameters() if p.device == device)
    return GPU_SHARE * (torch.cuda.get_device_properties(device).total_memory - there)


def _replace_linears(cell: Cell, block: nn.Module, prefix: str) -> dict[str, tuple[nn.Linear, nn.Module, MethodConfig]]:
    """Put the method's own modules in place; what was there and what is, by name."""
    out = {}
    for name, linear in linears_of(block).items():
        if (config := cell.config.for_layer(prefix + name)) is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, module := cell.spec.replace(linear, config))
            out[name] = (linear, module, config)
    return out


def _weights_only(cell: Cell, block: nn.Module, prefix: str) -> None:
    """Methods that need no calibration. Their layer error is ||W - W'|| / ||W||, that of white inputs."""
    if cell.spec.solve is None:
        for name, (linear, module, config) in _replace_linears(cell, block, prefix).items():
            cell.stored[prefix + name] = stored = bitsandbytes_.stored(prefix + name, module, config)
            cell.layers.append(layer_row(stored, bitsandbytes_.weight_error(linear.weight, module)))
        return
    for name, linear in linears_of(block).items():
        config = cell.config.for_layer(prefix + name)
        if config is not None:
            W_OI = _finite(linear.weight.float(), prefix + name)
            solution = cell.spec.solve(W_OI, Inputs([prefix + name], [linear.out_features], context=cell.context), config)
            error = (W_OI - solution.W_OI).norm() / W_OI.norm().clamp_min(1e-30)
            _keep(cell, linear, prefix + name, solution, config, slice(None), float(error))


def _finite(W_OI: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(W_OI.sum())):
        raise CellError(f"{name}: the model's own weights are not finite")
    return W_OI


def _keep(
    cell: Cell, linear: nn.Linear, name: str, solution: Solution, config: MethodConfig, rows: slice, error: float
) -> None:
    cell.stored[name], sparsity = put(linear, name, solution, config, rows, cell.spec.format)
    cell.layers.append(layer_row(cell.stored[name], error, sparsity))


@dataclass
class BlockPass:
    """One cell's calibration set going through one block."""

    cell: Cell
    block: nn.Module
    prefix: str
    groups: list[Group]
    kwargs: list[dict]  # a chunk each
    device: torch.device
    shared: dict[Key, Statistics]  # of the first group
    folds: list[tuple[Group, list[str], Tensor]] = field(default_factory=list)

    def run(self, *, last: bool) -> None:
        with all_tokens(self.block):
            self._run(last=last)

    def _run(self, *, last: bool) -> None:
        cell = self.cell
        if cell.spec.replace:
            _replace_linears(cell, self.block, self.prefix)
        if getattr(cell.config, "dense_inputs", False):
            self.solve_on_dense_inputs()
            if not last:
                cell.hidden = [self.by_sequence(i, len(h), (), lambda k, X: None) for i, h in enumerate(cell.hidden)]
        elif len(self.kwargs) == 1:
            out = self.forward(0, range(len(self.groups)), self.solve_at_once, stop=last)
            cell.hidden = [] if out is None else [out]
        else:
            for stage in self.stages():
                self.solve_by_chunks(stage)
            if not last:
                cell.hidden = [self.forward(i, (), lambda k, X: None).to(h.device) for i, h in enumerate(cell.hidden)]
        for group, names, scale_I in self.folds:
            fold_scale(cell.stored, self.block, self.prefix, group.fold, names, scale_I)

    def solve_on_dense_inputs(self) -> None:
        """Solve every group on what the dense block gives.

        One sequence at a time, as the official code of Wanda does: at 2:4 small models answer to rounding, and this way ours is the same.
        """
        every = range(len(self.groups))
        accumulators = [self.accumulators(k, {}) for k in every]  # another cell may have gathered the same in other pieces
        for i, hidden in enumerate(self.cell.hidden):
            self.by_sequence(i, len(hidden), every, lambda k, X: [a.add(X) for a in accumulators[k].values()], stop=True)
        for k in every:
            self.solve(k, accumulators[k])

    def by_sequence(
        self, chunk: int, rows: int, at: Sequence[int], seen: Callable[[int, Tensor], Any], *, stop: bool = False
    ) -> Tensor | None:
        """As `forward`, one after the other of the chunk's rows; the results are stacked where the chunk is."""
        hidden, kwargs = self.cell.hidden[chunk], self.kwargs[chunk]
        out = []
        for r in range(rows):
            one = torch.tensor([r], device=self.device)
            part = replace(
                self,
                cell=replace(self.cell, hidden=[hidden[r : r + 1]]),
                kwargs=[take_rows(kwargs, one, len(hidden))],
                shared={},
            )
            out.append(part.forward(0, at, seen, stop=stop))
        return None if stop or not out else torch.cat(out).to(hidden.device)

    def forward(
        self, chunk: int, at: Sequence[int], seen: Callable[[int, Tensor], Any], *, stop: bool = False
    ) -> Tensor | None:
        """A chunk through the block, ``seen(k, input)`` at groups ``at``; ``stop``: no further than the last of them (None)."""

        def hook(k: int) -> Callable:
            def call(_: nn.Module, args: tuple) -> None:
                X = args[0]
                seen(k, X if X.ndim > 2 else X.unflatten(0, (len(self.cell.hidden[chunk]), -1)))  # experts read [B T, I]
                if stop and k == at[-1]:
                    raise Stop

            return call

        with ExitStack() as hooks:
            for k in at:
                first = self.block.get_submodule(self.groups[k].linears[0])
                hooks.callback(first.register_forward_pre_hook(hook(k)).remove)
            try:
                return self.block(self.cell.hidden[chunk].to(self.device), **self.kwargs[chunk])
            except Stop:
                return None

    def solve_at_once(self, k: int, X: Tensor) -> None:
        accumulators = self.accumulators(k, self.shared if k == 0 else {})
        for a in accumulators.values():
            if not a.tokens:
                a.add(X)
        self.solve(k, accumulators)

    def stages(self) -> list[list[int]]:
        """Groups by turns: the last layers of a mixture's experts, which do not wait for one another, up to HESSIANS; else one."""
        stages: list[list[int]] = []
        before, inside = None, [f"{name}." for name in mixtures(self.block)]
        for k, group in enumerate(self.groups):
            first = group.linears[0]
            mixture = next((m for m in inside if first.startswith(m) and first.endswith(".down_proj")), None)
            linear: Any = self.block.get_submodule(first)
            most = HESSIANS // (4 * linear.in_features**2)
            if mixture is not None and mixture == before and len(stages[-1]) < most:
                stages[-1].append(k)
            else:
                stages.append([k])
            before = mixture
        return stages

    def solve_by_chunks(self, stage: list[int]) -> None:
        """The inputs of the groups of one stage, chunk by chunk; only their statistics stay."""
        accumulators = {k: self.accumulators(k, self.shared if k == 0 else {}) for k in stage}
        empty = {k: [a for a in some.values() if not a.tokens] for k, some in accumulators.items()}
        if any(empty.values()):
            for chunk in range(len(self.kwargs)):
                self.forward(chunk, stage, lambda k, X: [a.add(X) for a in empty[k]], stop=True)
        for k in stage:
            self.solve(k, accumulators[k])

    def parts(self, k: int) -> list[tuple[MethodConfig, list[str]]]:
        """The linears of group ``k`` that are compressed, by the parameters that hold for them."""
        parts: list[tuple[MethodConfig, list[str]]] = []
        for name in self.groups[k].linears:
            config = self.cell.config.for_layer(self.prefix + name)
            same = [names for known, names in parts if known == config]
            if same:
                same[0].append(name)
            elif config is not None:
                parts.append((config, [name]))
        return parts

    def key(self, config: MethodConfig) -> Key:
        return frozenset(self.cell.spec.statistics(config)), getattr(config, "token_clip", None)

    def accumulators(self, k: int, held: dict[Key, Statistics]) -> dict[Key, Statistics]:
        """Statistics for group ``k``: those ``held`` from another cell with the same inputs, or empty."""
        for wanted, clip in {self.key(config): None for config, _ in self.parts(k)}:
            held.setdefault((wanted, clip), Statistics(self.prefix + self.groups[k].linears[0], set(wanted), clip))
        return {key: held[key] for config, _ in self.parts(k) if (key := self.key(config))}

    def solve(self, k: int, accumulators: dict[Key, Statistics]) -> None:
        group, cell = self.groups[k], self.cell
        for config, names in self.parts(k):
            linears: list[Any] = [self.block.get_submodule(n) for n in names]
            inputs = Inputs(
                [self.prefix + n for n in names],
                [m.out_features for m in linears],
                context=cell.context,
                fold=group.fold if names == group.linears else None,  # a scale folds only if all that read the input share it
                **accumulators[self.key(config)].finish(),
            )
            W_OI = _finite(torch.cat([m.weight for m in linears]).float(), ", ".join(inputs.names))
            solution = cell.spec.solve(W_OI, inputs, config)
            effective = solution.W_OI if solution.input_scale is None else solution.W_OI / solution.input_scale
            if not bool(torch.isfinite(effective.sum())):
                raise CellError(f"{inputs.names[0]}: {cell.spec.name} gave weights that are not finite")
            errors = [
                float(((w - v) @ inputs.sketch).norm() / (w @ inputs.sketch).norm().clamp_min(1e-30))
                for w, v in zip(W_OI.split(inputs.outs), effective.split(inputs.outs), strict=True)
            ]
            low = 0
            for name, linear, error in zip(inputs.names, linears, errors, strict=True):
                _keep(cell, linear, name, solution, config, slice(low, low + linear.out_features), error)
                low += linear.out_features
            if solution.input_scale is not None and inputs.fold is not None:
                self.folds.append((group, names, solution.input_scale))
