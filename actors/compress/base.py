"""What every compression method shares: its configuration, the shape of its answer, and how stored bytes are counted.

Shape suffixes in this package: O outputs, I inputs of a linear; G groups along I; T calibration tokens; K columns of a sketch.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

Progress = Callable[[str, int, int], None]
Bits = Literal[2, 3, 4, 8]
#: Inputs that share a scale; None is one scale per output channel. 0 is accepted and means None.
GroupSize = Annotated[
    Annotated[int, Field(ge=8)] | None,
    BeforeValidator(lambda g: g or None),
    Field(description="weights per scale; null: per channel"),
]


class MethodConfig(BaseModel):
    """Base of every method's parameters: names, defaults, bounds. Everything here is part of a cell's identity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    skip: tuple[str, ...] = Field(default=(), description="globs over layer names that stay dense, e.g. '*.0.mlp.down_proj'")
    overrides: dict[str, dict[str, Any]] = Field(
        default={}, description="glob over layer names -> parameters that differ there"
    )

    @model_validator(mode="after")
    def _overrides_are_parameters(self) -> MethodConfig:
        for glob, params in self.overrides.items():
            if bad := set(params) - set(type(self).model_fields) | set(params) & (
                {"skip", "overrides"} | self.of_the_whole_cell()
            ):
                raise ValueError(f"overrides[{glob!r}] holds {sorted(bad)}, which this method does not take per layer")
            try:
                self.merged(params)
            except ValidationError as e:
                first = e.errors()[0]
                at = ".".join(str(p) for p in first["loc"])
                raise ValueError(f"overrides[{glob!r}] holds {at} {first['input']!r}: {first['msg']}") from None
        return self

    def of_the_whole_cell(self) -> set[str]:
        """Parameters that no override may change: they are read once for all layers."""
        return set()

    def merged(self, params: Mapping[str, Any]) -> MethodConfig:
        """This configuration with ``params`` changed, validated again.

        Values that follow from others are derived anew, whether they were written out (as in the JSON of a cell) or not.
        """
        values = self.model_dump(exclude={"skip", "overrides"})
        validate = type(self).model_validate
        given = {k for k, v in values.items() if getattr(validate({o: values[o] for o in values if o != k}), k) != v}
        kept = given | self.of_the_whole_cell()
        return validate({k: v for k, v in values.items() if k in kept} | dict(params))

    def for_layer(self, name: str) -> MethodConfig | None:
        """The parameters that hold for one linear; None where it stays dense. The longest of the globs that match wins.

        A cell's key knows no order of globs, so theirs must not matter.
        """
        if any(fnmatch.fnmatch(name, glob) for glob in self.skip):
            return None
        params: dict[str, Any] = {}
        for glob, changed in sorted(self.overrides.items(), key=lambda item: (len(item[0]), item[0])):
            if fnmatch.fnmatch(name, glob):
                params |= changed
        return self.merged(params) if params else self

    def impossible(self) -> str | None:
        """Why these values contradict each other, or None. Found before any weights are read."""
        return None

    def misfit(self, name: str, inputs: int) -> str | None:
        """Why a linear with ``inputs`` inputs cannot be compressed this way, or None."""
        group = getattr(self, "group_size", None)
        return f"group size {group} does not divide the {inputs} inputs of {name}" if group and inputs % group else None

    def unfit(self, linears: Mapping[str, int]) -> str | None:
        """Why a model with these ``linears`` (name -> inputs) cannot be compressed this way, or None."""
        for knob, globs in (("skip", self.skip), ("overrides", self.overrides)):
            for glob in globs:
                if not fnmatch.filter(linears, glob):
                    return f"{glob!r} of {knob} matches no layer; one is {next(iter(linears))}"
        layers = self.compressed(linears)
        if not layers:
            return f"skip {list(self.skip)} leaves no layer to compress"
        for name, config in layers.items():
            if why := config.impossible():
                return why
            if why := config.misfit(name, linears[name]):
                return why + _smaller_group(config, layers, linears)
        return None

    def compressed(self, linears: Iterable[str]) -> dict[str, MethodConfig]:
        """The parameters of each of ``linears`` that does not stay dense."""
        return {name: config for name in linears if (config := self.for_layer(name)) is not None}


def _smaller_group(misfit: MethodConfig, layers: Mapping[str, MethodConfig], linears: Mapping[str, int]) -> str:
    """The largest usual group size that fits all layers with that of ``misfit``, as advice; nothing if another size is no help."""
    group = getattr(misfit, "group_size", None) or 0
    same = {n: c for n, c in layers.items() if getattr(c, "group_size", None) == group}
    for size in (s for s in (256, 128, 96, 64, 48, 32, 16, 8) if s < group):
        tried = {n: c.model_copy(update={"group_size": size}) for n, c in same.items()}
        if not any(c.impossible() or c.misfit(n, linears[n]) for n, c in tried.items()):
            return f" (try {size})"
    return ""


def parse_pattern(pattern: str | None) -> tuple[int, int] | None:
    """``'2:4'`` -> (2, 4), two of every four inputs are kept; unstructured -> None."""
    if pattern in (None, "unstructured"):
        return None
    n, _, m = pattern.partition(":")
    return int(n), int(m)


def _pattern(value: str) -> str:
    if value == "unstructured":
        return value
    n, colon, m = value.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 32):
        raise ValueError(f"pattern {value!r} is neither 'unstructured' nor N:M with N of M <= 32 weights kept, like '2:4'")
    return f"{int(n)}:{int(m)}"  # one spelling: formats and bytes go by it


Pattern = Annotated[str, BeforeValidator(lambda p: p or "unstructured"), AfterValidator(_pattern)]


class PruningConfig(MethodConfig):
    """Share of zeros and where they may lie. A pattern implies its sparsity."""

    sparsity: float = Field(default=0.5, gt=0, lt=1, description="share of weights set to zero")
    pattern: Pattern = Field(default="unstructured", description="'unstructured', or 'N:M': N of every M inputs are kept")

    @model_validator(mode="before")
    @classmethod
    def _pattern_implies_sparsity(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("sparsity") is None:
            values = {k: v for k, v in values.items() if k != "sparsity"}
            n, colon, m = str(values.get("pattern") or "").partition(":")
            if colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m):
                values["sparsity"] = 1 - int(n) / int(m)
        return values

    def merged(self, params: Mapping[str, Any]) -> MethodConfig:
        return super().merged({"sparsity": None, **params} if ":" in str(params.get("pattern")) else params)

    def impossible(self) -> str | None:
        nm = parse_pattern(self.pattern)
        if nm and not math.isclose(self.sparsity, 1 - nm[0] / nm[1]):
            return f"pattern {self.pattern} means sparsity {1 - nm[0] / nm[1]:g}, but sparsity is {self.sparsity:g}"
        return super().impossible()

    def misfit(self, name: str, inputs: int) -> str | None:
        nm = parse_pattern(self.pattern)
        if nm and inputs % nm[1]:
            return f"pattern {self.pattern} does not divide the {inputs} inputs of {name}"
        return super().misfit(name, inputs)


@dataclass(frozen=True)
class StoredLinear:
    """One compressed linear as it would be stored; what export and packing need.

    ``weight = (codes - zero) * scale`` per group (zero None: symmetric, signed codes). ``codes`` None: the values are the
    module's own weight (pruned), or the module holds them itself (bitsandbytes).
    """

    name: str
    shape: tuple[int, int]  # O, I
    bits: float  # per code; bits of the model's dtype where values are not quantised
    codes: Tensor | None = None  # [O, I] int8 (symmetric) or uint8 (with zero)
    scale: Tensor | None = None  # [O, G] float16
    zero: Tensor | None = None  # [O, G] uint8
    group_size: int | None = None  # None: G = 1
    group_index: Tensor | None = None  # [I] int32: group of each input, where groups do not lie side by side (act-order)
    input_scale: Tensor | None = None  # [I] float32: the layer's input is divided by it, where it could not be folded away
    pattern: str | None = None  # None: not pruned
    format: str = "dense"  # 'int', 'pruned', 'int8', 'nf4', 'fp4', 'w8a8': what a reader needs to know to run it
    size_bytes: int = 0  # weights, scales, zero points, masks, indices; without the bias

    @property
    def symmetric(self) -> bool:
        return self.zero is None

    def dequantise(self) -> Tensor:
        """The exact weights [O, I] float32 of the codes, before ``input_scale``; ValueError without codes."""
        if self.codes is None or self.scale is None:
            raise ValueError(f"{self.name} holds no codes")
        I = self.shape[1]
        index = self.group_index
        if index is None:
            index = torch.arange(I, device=self.codes.device) // (self.group_size or I)
        q = self.codes.float()
        if self.zero is not None:
            q -= self.zero.float()[:, index.long()]
        return q * self.scale.float()[:, index.long()]


@dataclass
class Solution:
    """A method's answer for linears that share an input, stacked along O."""

    W_OI: Tensor  # float32, what the layer computes with (before the input is divided by input_scale)
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    group_index: Tensor | None = None
    input_scale: Tensor | None = None  # [I]


@dataclass
class Inputs:
    """What a method may ask of the calibration inputs X_TI of linears that share them; only what it asked for is set."""

    names: list[str]
    outs: list[int]  # outputs of each linear, in the order they are stacked along O
    gram: Any = None  # Tensor [I, I] float32: X'X
    norm: Any = None  # Tensor [I] float32: ||X_i||_2
    mean_abs: Any = None  # Tensor [I] float32
    max_abs: Any = None  # Tensor [I] float32
    sketch: Any = None  # Tensor [I, K] float32: X'S with random signs, E[sketch sketch'] = X'X
    fold: Any = None  # structure.Fold: where an input scale can vanish; None: nowhere
    context: Any = None  # what the method's `prepare` returned


@dataclass(frozen=True)
class MethodSpec:
    """A method as the engine and the sweep see it."""

    name: str
    config: type[MethodConfig]
    needs_calibration: bool = False
    backend: str = "comptrust"
    #: (W_OI float32, inputs, config) -> Solution; None for methods that replace modules.
    solve: Any = None
    #: config -> names of the fields of `Inputs` it needs
    statistics: Callable[[Any], set[str]] = lambda config: set()
    #: (linear, config) -> module that takes its place, made before calibration
    replace: Any = None
    #: (model, linears by name, config, tokens, device, progress) -> context, before the first block
    prepare: Any = None
    folds: bool = False  # the method scales inputs and wants the scales folded away
    format: str = "int"  # StoredLinear.format of what has codes
    #: (config, inputs of a linear) -> calibration tokens it needs at least
    min_tokens: Callable[[Any, int], int] = lambda config, inputs: 1

    def least_tokens(self, config: MethodConfig, linears: Mapping[str, int]) -> int:
        """Calibration tokens that the widest compressed one of ``linears`` (name -> inputs) needs; 0 if the method needs none."""
        layers = config.compressed(linears) if self.needs_calibration else {}
        return max((self.min_tokens(c, linears[name]) for name, c in layers.items()), default=0)


@dataclass
class Compressed:
    """A compressed model and what it would cost to store. Untouched tensors are shared with the model it came from."""

    model: nn.Module
    layers: list[dict[str, Any]] = field(default_factory=list)  # layer, error, sparsity, bits: rows of table `layers`
    stored: dict[str, StoredLinear] = field(default_factory=dict)
    size_bytes: int = 0  # the whole model
    bits_per_weight: float = 0.0  # over the compressed linears; over all weights if there are none
    sparsity_reached: float | None = None  # zeros among the weights of the compressed linears; None: not a pruning method
    parameters: int = 0  # of the dense model, tied weights once
    seconds: float = 0.0


def packed_bytes(shape: tuple[int, int], *, bits: float, pattern: str | None, nonzero: int, quantised: bool = False) -> int:
    """Bytes of the values of one linear as `comptrust.kernels.formats` packs them, with masks or indices, without scales.

    2:4 (and 1:2, which is a case of it): half the values and two 2-bit positions a group of 4; 4:8 and 8:16: half the values
    and 4-bit positions; anything else: the non-zeros, a bitmap and row offsets, or dense where that is smaller. Pruned
    weights that are quantised as well pack only as 2:4 with 4 bit; elsewhere every position costs its ``bits``.
    """
    O, I = shape
    wide = math.ceil(I / 32) * 32  # rows are padded to whole words
    # 3 bits lie in two planes, of 2 and 1: rows end with a whole word of the narrow one
    dense = O * math.ceil((wide if bits == 3 else I) * bits / 32) * 4 if quantised else math.ceil(O * I * bits / 8)
    if pattern in ("1:2", "2:4") and (bits == 4 or not quantised):
        return math.ceil(O * wide / 2 * bits / 8) + O * wide // 8
    if pattern is None or quantised:
        return dense
    if pattern in ("4:8", "8:16"):
        wide = math.ceil(I / 16) * 16
        return math.ceil(O * wide / 2 * bits / 8) + O * wide // 4
    return min(dense, math.ceil(nonzero * bits / 8) + O * wide // 8 + 4 * (O + 1))


def zero_bytes(zero_OG: Tensor, bits: float) -> int:
    """Bytes of zero points, which every layout packs at the width of the codes."""
    return math.ceil(zero_OG.numel() * bits / 8)


def element_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
