"""Run by ``test_interpreter.py`` with TRITON_INTERPRET=1, which must be set before a kernel module is imported.

Prints one JSON line a case: kernel, format, dtype, [tokens, rows, columns] and the error against float64 of the dense weight;
or ``probe``, [rows, columns] and the number of wrong results of a one-hot probe.
"""

from __future__ import annotations

import json
import sys
import zlib

import kernel_cases as ref
import torch
from comptrust.kernels.dispatch import KERNELS
from comptrust.kernels.formats import pack
from comptrust.kernels.layouts import arrange
from comptrust.kernels.matmul import matmul

#: tokens, rows, columns: one row, odd everything, whole tiles, a last step that is cut
SHAPES = [(1, 1, 32), (3, 37, 92), (2, 16, 256), (17, 20, 132)]
GROUPS = [32, 24, 128, 400]


def guarded(t: torch.Tensor) -> torch.Tensor:
    """The tensor between bands of poison (NaN, or all ones): reading outside shows up in the result."""
    band = 64
    wide = torch.empty(t.numel() + 2 * band, dtype=t.dtype)
    wide.fill_(float("nan") if t.dtype.is_floating_point else (-1 if t.dtype.is_signed else 255))
    wide[band : band + t.numel()] = t.reshape(-1)
    return wide[band : band + t.numel()].view(t.shape)


def main(names: list[str]) -> None:
    for kernel in (k for k in KERNELS.values() if k.interpreted and k.name in names):
        for format in kernel.formats:
            for i, ((T, O, I), group) in enumerate(zip(SHAPES, GROUPS, strict=True)):
                dtype = torch.bfloat16 if i == 1 else torch.float16
                if kernel.tokens < T:
                    continue
                seed = zlib.crc32(f"{kernel.name}{format}{T}".encode())
                W, kw = ref.weight((O, I), format, dtype=dtype, group_size=group, seed=seed, zero_point=T != 3)
                packed = arrange(pack(W, format, **kw), kernel.layout)
                for name, t in packed.tensors.items():
                    packed.tensors[name] = guarded(t)
                x = guarded(torch.randn(T, I, generator=torch.Generator().manual_seed(seed)).to(dtype))
                y = matmul(x, packed, kernel.name)
                print(json.dumps([kernel.name, format, str(dtype), [T, O, I], ref.error(y, x, W)]), flush=True)
            for W, x, want in ref.probes(64, 2):
                y = matmul(x, pack(W, format, **ref.identity_scale(W.shape[0], format)), kernel.name)
                print(json.dumps([kernel.name, format, "probe", list(W.shape), int((y != want).sum())]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
