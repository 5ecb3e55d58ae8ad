"""Optimal brain surgeon on one linear's columns: what GPTQ and SparseGPT share.

Weights are handled transposed, W_IO: a "column" of the papers is a contiguous row here, which is what a CPU likes.

Frantar & Alistarh 2022, "Optimal Brain Compression", arXiv:2208.11580; Frantar et al. 2022, "GPTQ", arXiv:2210.17323, section 3
and algorithm 1 (lazy batches, Cholesky form).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CellError


class Policy(Protocol):
    """Decides what each row of W_IO becomes while the sweep passes over it."""

    block: int  # rows per lazy block
    micro: int  # rows per micro block, divides ``block``

    def begin_block(self, W_BO: Tensor, diag_B: Tensor, start: int) -> None: ...
    def begin_micro(self, W_MO: Tensor, diag_M: Tensor, start: int) -> None: ...
    def row(self, w_O: Tensor, i: int) -> Tensor: ...


def inverse_factor(H_II: Tensor, damping: float, *, name: str, escalate: Sequence[float] = (10, 100, 1000)) -> Tensor:
    """Upper triangular U [I, I] float32 with U'U = (H + damping * mean(diag H) * 1)^-1.

    One Cholesky of the reversed matrix and one triangular solve, instead of Cholesky, inverse and Cholesky. Where float32 fails
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
                eye = torch.eye(len(L), dtype=dtype, device=L.device)
                U = torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True).float()
                if bool(torch.isfinite(U.diagonal()).all()):
                    return U
    raise CellError(
        f"{name}: the Hessian of its inputs is singular even with damping {damping * escalate[-1]:g}; more tokens may help"
    )


def sweep(W_IO: Tensor, U_II: Tensor, policy: Policy) -> None:
    """Replace each row of ``W_IO`` by ``policy.row``, spreading its error over the rows behind; in place.

    Left-looking: pending errors reach a micro block by one small product, the blocks behind by one large one.
    """
    n, diag = len(W_IO), U_II.diagonal()
    for b0 in range(0, n, policy.block):
        b1 = min(b0 + policy.block, n)
        E_BO = torch.empty(b1 - b0, W_IO.shape[1], device=W_IO.device)
        policy.begin_block(W_IO[b0:b1], diag[b0:b1], b0)
        for m0 in range(b0, b1, policy.micro):
            m1 = min(m0 + policy.micro, b1)
            if m0 > b0:
                W_IO[m0:m1].addmm_(U_II[b0:m0, m0:m1].T, E_BO[: m0 - b0], alpha=-1)
            policy.begin_micro(W_IO[m0:m1], diag[m0:m1], m0)
            for i in range(m0, m1):
                w, e = W_IO[i], E_BO[i - b0]
                q = policy.row(w, i)
                torch.sub(w, q, out=e)
                e.div_(diag[i])
                w.copy_(q)
                if i + 1 < m1:
                    W_IO[i + 1 : m1].addcmul_(U_II[i, i + 1 : m1, None], e, value=-1)
        if b1 < n:
            W_IO[b1:].addmm_(U_II[b0:b1, b1:].T, E_BO, alpha=-1)


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
