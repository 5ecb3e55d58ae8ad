"""``CompressedLinear``: a packed weight in the place of an ``nn.Linear``, also under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .dispatch import choose
from .formats import Packed
from .layouts import arrange
from .matmul import matmul, select


@torch.library.custom_op("comptrust::packed_matmul", mutates_args=())
def packed_matmul(
    x: torch.Tensor, tensors: list[torch.Tensor], names: str, format: str, layout: str, rows: int, group_size: int, backend: str
) -> torch.Tensor:
    """``matmul`` on flattened leading dimensions; ``tensors`` and comma-separated ``names`` are those of the packed weight."""
    packed = Packed(
        format, (rows, x.shape[-1]), x.dtype, dict(zip(names.split(","), tensors, strict=True)), group_size or None, layout
    )
    return matmul(x.reshape(-1, x.shape[-1]), packed, backend).view(*x.shape[:-1], rows)


@packed_matmul.register_fake
def _(x, tensors, names, format, layout, rows, group_size, backend):
    return x.new_empty(*x.shape[:-1], rows)


class CompressedLinear(nn.Module):
    """``nn.Linear`` over a packed weight; inference only. The packed tensors are buffers, named as in ``formats``.

    With ``dense`` (what ``swap`` gives it in ``auto``) token counts at which the measured table prefers dense run the original
    layer: fastest, at the price of both copies. Without, only the packed weight is held.
    """

    def __init__(
        self, packed: Packed, bias: torch.Tensor | None = None, *, backend: str = "auto", dense: nn.Linear | None = None
    ):
        super().__init__()
        kernel = select(backend, packed, 1, packed.device)
        packed = arrange(packed, kernel.layout if kernel else packed.layout)
        self.out_features, self.in_features = packed.shape
        self.format, self.layout, self.dtype, self.group_size = packed.format, packed.layout, packed.dtype, packed.group_size
        self.backend, self.dense = backend, dense
        self.names = tuple(packed.tensors)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def packed(self) -> Packed:
        """The stored weight; shares its tensors."""
        tensors = {name: getattr(self, name) for name in self.names}
        return Packed(self.format, (self.out_features, self.in_features), self.dtype, tensors, self.group_size, self.layout)

    def kernel(self, tokens: int) -> str:
        """What a forward pass of this many tokens runs: a kernel's name, ``torch`` (unpack, then dense) or ``dense``."""
        kernel = select(self.backend, self.packed, tokens, getattr(self, self.names[0]).device)
        return kernel.name if kernel else "torch" if self.dense is None else "dense"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features or x.dtype != self.dtype:  # the operation takes both from x
            raise ValueError(f"x must be [..., {self.in_features}] {self.dtype}, got {tuple(x.shape)} {x.dtype}")
        if self.dense is not None and self.kernel(x.numel() // self.in_features) == "dense":
            return self.dense(x)
        tensors = [getattr(self, name) for name in self.names]
        y = packed_matmul(
            x, tensors, ",".join(self.names), self.format, self.layout, self.out_features, self.group_size or 0, self.backend
        )
        return y if self.bias is None else y + self.bias

    def _apply(self, fn, recurse=True):
        before = [getattr(self, name).dtype for name in self.names]
        super()._apply(fn, recurse)
        if before != [getattr(self, name).dtype for name in self.names]:
            raise ValueError(f"a packed layer keeps its dtype ({self.dtype}): unpack the weight, convert it, pack it again")
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, format={self.format!r}, layout={self.layout!r}, backend={self.backend!r}"
        )


def swap(model: nn.Module, packed_by_name: Mapping[str, Packed], *, backend: str = "auto") -> dict[str, str]:
    """Replace linears of ``model`` in place; returns the kernel each named one runs for a single token.

    ``auto`` replaces a linear only where the measured table has a kernel for its shape on its device that beats dense, and leaves
    the others (``dense`` in the answer); ``torch``, ``triton`` or a kernel's name replaces every one.

    Raises:
        ValueError: no ``nn.Linear`` of that name, another shape or dtype, or a backend that cannot run there.
    """
    modules = dict(model.named_modules())
    for name, packed in packed_by_name.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            what = "no module" if linear is None else type(linear).__name__
            raise ValueError(f"{name!r} is {what}, not an nn.Linear of the model")
        here = (tuple(linear.weight.shape), linear.weight.dtype)
        if here != (packed.shape, packed.dtype):
            raise ValueError(f"{name}: the packed weight is {packed.shape} {packed.dtype}, the layer {here[0]} {here[1]}")
    chosen = {}
    for name, packed in packed_by_name.items():
        linear = modules[name]
        packed = packed.to(linear.weight.device)
        if backend == "auto" and all(choose(packed, tokens, packed.device) == "dense" for tokens in (1, 16, 64, 2048)):
            chosen[name] = "dense"
            continue
        new = CompressedLinear(packed, linear.bias, backend=backend, dense=linear if backend == "auto" else None)
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent] if parent else model, leaf, new)
        chosen[name] = new.kernel(1)
    return chosen
