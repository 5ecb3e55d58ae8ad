"""``y = x W^T`` with a packed W: one entry, a torch reference for every format, Triton kernels where they can run."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from .dispatch import KERNELS, Kernel, choose, reachable, unreachable
from .formats import FORMATS, Packed, row_blocks, unpack_rows
from .layouts import arrange, restore

BACKENDS = ("auto", "torch", "triton")


def matmul(x_TI: torch.Tensor, packed: Packed, backend: str = "auto") -> torch.Tensor:
    """``x_TI @ W.T`` [T, O] in the dtype of ``x_TI``, accumulated in float32.

    ``backend``: ``torch`` unpacks blocks of about 4 million weights and multiplies each densely; ``triton`` runs the first kernel
    that can (``dispatch.KERNELS``); a kernel's name runs that one; ``auto`` is the measured table, torch where it says dense.
    A kernel that reads another layout than the weight has gets a copy, kept with the weight (``packed.arranged``).

    Raises:
        ValueError: what is wrong with the input, and what is supported.
    """
    check(x_TI, packed)
    tokens = x_TI.shape[0]
    kernel = select(backend, packed, tokens, x_TI.device)
    if tokens == 0:
        return x_TI.new_empty((0, packed.shape[0]))
    return reference(x_TI, packed) if kernel is None else run(kernel, x_TI, packed)


def reference(x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    """The plain meaning of every format, on any device; holds one block of dense rows at a time."""
    if packed.layout in ("fragments", "library"):
        packed = restore(packed)
    y_TO = x_TI.new_empty((x_TI.shape[0], packed.shape[0]))
    for a, b in row_blocks(*packed.shape):
        y_TO[:, a:b] = F.linear(x_TI, unpack_rows(packed, a, b))
    return y_TO


def run(kernel: Kernel, x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    """One kernel, its layout made if need be."""
    if packed.layout != kernel.layout:
        if kernel.layout not in packed.arranged:
            packed.arranged[kernel.layout] = arrange(packed, kernel.layout)
        packed = packed.arranged[kernel.layout]
    x_TI = x_TI.contiguous()
    if x_TI.data_ptr() % 16:  # a slice of a larger tensor: kernels read x in whole vectors
        x_TI = x_TI.clone()
    return importlib.import_module(f".{kernel.name}", __package__).run(x_TI, packed)


def check(x_TI: torch.Tensor, packed: Packed) -> None:
    """A ``ValueError`` unless ``x_TI`` [T, I] fits the weight."""
    if not isinstance(packed, Packed):
        raise ValueError(f"matmul needs a weight from pack(), got {type(packed).__name__}")
    if not isinstance(x_TI, torch.Tensor) or x_TI.dim() != 2 or x_TI.shape[1] != packed.shape[1]:
        shape = tuple(getattr(x_TI, "shape", ()))
        raise ValueError(f"x must be [tokens, {packed.shape[1]}] for a weight of shape {packed.shape}, got {shape}")
    if x_TI.dtype != packed.dtype:
        raise ValueError(f"x must be {packed.dtype} like the packed weight, got {x_TI.dtype}")
    if x_TI.device != packed.device:
        raise ValueError(f"x is on {x_TI.device}, the packed weight on {packed.device}: move one (packed.to(device))")


def select(backend: str, packed: Packed, tokens: int, device: torch.device) -> Kernel | None:
    """The kernel that ``backend`` means for this weight and number of tokens on ``device``; None is the torch reference."""
    if backend == "torch":
        return None
    if backend == "auto":
        return KERNELS.get(choose(packed, tokens, device))
    if backend in KERNELS:
        if reason := unreachable(KERNELS[backend], packed, tokens, device):
            raise ValueError(reason)
        return KERNELS[backend]
    if backend != "triton":
        raise ValueError(f"unknown backend {backend!r}; backends are {', '.join(BACKENDS)} and kernels {', '.join(KERNELS)}")
    if found := reachable(packed, tokens, device):
        return found[0]
    able = [k for k in KERNELS.values() if k.triton and packed.format in k.formats]
    if not able:
        raise ValueError(f"no kernel multiplies {packed.format}; kernels are for {', '.join(FORMATS)}")
    reasons = "; ".join(unreachable(k, packed, tokens, device) or "" for k in able)
    raise ValueError(f"backend 'triton' cannot run here: {reasons}. backend='torch' runs anywhere")
