"""2:4 through cuSPARSELt as torch ships it: the library's sparse tensor-core kernels, which lead where arithmetic is the limit.

The compressed form (layout ``library``, 9 bits a weight) is the library's own; it is made and read on a GPU only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .formats import Packed


def cannot(packed: Packed) -> str | None:
    """Why the library cannot hold this weight here, or None."""
    if packed.format != "2:4":
        return f"layout 'library' belongs to 2:4, not to {packed.format}"
    if packed.shape[0] % 16 or packed.shape[1] % 16:
        return f"layout 'library' needs rows and columns that are multiples of 16, got {packed.shape}"
    if packed.device.type != "cuda" or not torch.backends.cusparselt.is_available():
        return f"layout 'library' needs a weight on a GPU and a torch with cuSPARSELt, the weight is on {packed.device}"
    return None


def compress(W_OI: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"compressed": torch._cslt_compress(W_OI)}


def decompress(packed: Packed) -> torch.Tensor:
    """The dense weight, as the product with the identity: the library offers no other way back."""
    return run(torch.eye(packed.shape[1], dtype=packed.dtype, device=packed.device), packed).T.contiguous()


def run(x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    T = x_TI.shape[0]
    x_TI = F.pad(x_TI, (0, 0, 0, -T % 8))
    return torch._cslt_sparse_mm(packed.tensors["compressed"], x_TI.t(), transpose_result=True)[:T].contiguous()
