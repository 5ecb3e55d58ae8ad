"""Optimal brain surgeon on one linear's columns: what GPTQ and SparseGPT share.

Weights are handled transposed, W_IO: a "column" of the papers is a contiguous row here, which is what a CPU likes.

Frantar & Alistarh 2022, "Optimal Brain Compression", arXiv:2208.11580; Frantar et al. 2022, "GPTQ", arXiv:2210.17323, section 3
and algorithm 1 (lazy batches, Cholesky form).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CellError


class Policy(Protocol):
    """Decides what each row of W_IO becomes while the sweep passes over it."""

    group: int  # no lazy block crosses a multiple of it
    block: int  # rows per lazy block
    micro: int  # rows per micro block

    def begin_block(self, W_BO: Tensor, diag_B: Tensor, start: int) -> None:
        """May put the block into units of its own, a factor per output."""

    def begin_micro(self, W_MO: Tensor, diag_M: Tensor, start: int) -> None: ...

    def row(self, w_O: Tensor, i: int, out_O: Tensor) -> None:
        """Write into ``out_O`` what row ``i`` of the block becomes."""

    def end_block(self, Q_BO: Tensor, E_BO: Tensor) -> None:
        """Results and errors back from the block's units."""


def inverse_factor(H_II: Tensor, damping: float, *, name: str, escalate: Sequence[float] = (10, 100, 1000)) -> Tensor:
    """Upper triangular U [I, I] float32 with U'U = (H + damping * mean(diag H) * 1)^-1.

    One Cholesky of the reversed matrix and one triangular inverse, instead of Cholesky, inverse and Cholesky. Where float32 fails
    the factorisation is repeated in float64, then with ``damping`` times each of ``escalate``. CellError if all of them fail.
    """
    diag = H_II.diagonal()
    if not bool(torch.isfinite(diag).all()):
        raise CellError(f"{name}: the second moments of its inputs are not finite")
    mean = diag.mean()
    for factor in (1.0, *escalate):
        for dtype in (torch.float32, torch.float64):
            A = H_II.flip(0, 1).to(dtype)
            A.diagonal().add_(damping * factor * mean.to(dtype))
            L, failed = torch.linalg.cholesky_ex(A)
            del A
            if not failed:
                U = inverse_upper(L.flip(0, 1)).float()
                if bool(torch.isfinite(U.diagonal()).all()):
                    return U
    raise CellError(
        f"{name}: the Hessian of its inputs is singular even with damping {damping * escalate[-1]:g}; more tokens may help"
    )


def inverse_upper(R_II: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix by halves: matrix products, which run several times faster than a triangular solve."""
    n = len(R_II)
    if n <= 128:
        return torch.linalg.solve_triangular(R_II, torch.eye(n, dtype=R_II.dtype, device=R_II.device), upper=True)
    h = n // 2
    out = torch.zeros_like(R_II)
    out[:h, :h], out[h:, h:] = inverse_upper(R_II[:h, :h]), inverse_upper(R_II[h:, h:])
    out[:h, h:] = (out[:h, :h] @ R_II[:h, h:]).neg_() @ out[h:, h:]
    return out


def lazy_blocks(n: int, group: int, block: int) -> Iterator[tuple[int, int]]:
    """Bounds of blocks of at most ``block`` rows, none of which crosses a multiple of ``group``."""
    for g in range(0, n, group):
        end = min(g + group, n)
        yield from ((b, min(b + block, end)) for b in range(g, end, block))


def sweep(W_IO: Tensor, U_II: Tensor, policy: Policy) -> None:
    """Replace each row of ``W_IO`` by ``policy.row``, spreading its error over the rows behind; in place.

    Left-looking: pending errors reach a micro block by one small product, the blocks behind by one large one.
    """
    n, diag_I = len(W_IO), U_II.diagonal()
    for b0, b1 in lazy_blocks(n, policy.group, policy.block):
        W_BO, diag_B = W_IO[b0:b1], diag_I[b0:b1]
        policy.begin_block(W_BO, diag_B, b0)
        R_BB = U_II[b0:b1, b0:b1] / diag_B[:, None]  # what an error of 1 in a row changes behind it
        Q_BO, E_BO = torch.empty_like(W_BO), torch.empty_like(W_BO)
        w, q, e = W_BO.unbind(), Q_BO.unbind(), E_BO.unbind()
        for m0 in range(0, b1 - b0, policy.micro):
            m1 = min(m0 + policy.micro, b1 - b0)
            if m0:
                W_BO[m0:m1].addmm_(R_BB[:m0, m0:m1].T, E_BO[:m0], alpha=-1)
            policy.begin_micro(W_BO[m0:m1], diag_B[m0:m1], m0)
            for i in range(m0, m1):
                policy.row(w[i], i, q[i])
                torch.sub(w[i], q[i], out=e[i])
                if i + 1 < m1:
                    W_BO[i + 1 : m1].addcmul_(R_BB[i, i + 1 : m1, None], e[i], value=-1)
        policy.end_block(Q_BO, E_BO)
        W_BO.copy_(Q_BO)
        if b1 < n:
            W_IO[b1:].addmm_(U_II[b0:b1, b1:].T, E_BO.div_(diag_B[:, None]), alpha=-1)


def nested_order(diag_I: Tensor, *sizes: int) -> Tensor:
    """A permutation [I] that visits large diagonal entries first without tearing neighbours apart.

    ``sizes`` are nested block widths, smallest first (none: plain act-order). Inside each block entries go by size, blocks by
    their largest entry; equal ones in order of index. Group-aware order is ``nested_order(diag, group_size)``.
    """
    d = diag_I.double().cpu()
    keys: list[tuple[float, ...]] = [(-v, i) for i, v in enumerate(d.tolist())]
    for size in sizes:
        if len(d) % size:
            raise ValueError(f"{len(d)} inputs do not split into blocks of {size}")
        tops = (-d.view(-1, size).amax(1)).tolist()
        keys = [(tops[i // size], i // size, *k) for i, k in enumerate(keys)]
    return torch.tensor(sorted(range(len(d)), key=keys.__getitem__), device=diag_I.device)
