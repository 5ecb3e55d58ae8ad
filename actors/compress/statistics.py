"""What is gathered from calibration inputs X [T, I] of a linear: accumulated in float32, over any number of chunks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..errors import CellError

SKETCH = 64  # random directions kept of X: enough to report layer errors, a few per cent of a Gram matrix's cost


def clip_tokens(X_BTI: Tensor, limit: float | None) -> Tensor:
    """Tokens of each sequence scaled down until none has more than ``limit`` times the energy of the sequence's median token.

    A few tokens (the first of a text above all) carry activations hundreds of times larger than the rest in some layers; left
    alone they are most of X'X there, and damping relative to its diagonal then swamps all ordinary tokens. Within a sequence,
    so that the result does not depend on how the calibration set is split into chunks.
    """
    if limit is None:
        return X_BTI
    energy_BT = torch.linalg.vector_norm(X_BTI, dim=-1).square_()
    median_B1 = energy_BT.median(-1, keepdim=True).values
    tiny = torch.finfo(torch.float32).tiny
    weight_BT = torch.where(median_B1 > 0, limit * median_B1 / energy_BT.clamp_min(tiny), 1.0).clamp_(max=1.0).sqrt_()
    hot = weight_BT < 1
    if bool(hot.any()):
        X_BTI = X_BTI.clone()
        X_BTI[hot] *= weight_BT[hot, None]
    return X_BTI


def gram(X_TI: Tensor) -> Tensor:
    """X'X [I, I] float32. On a CPU by NumPy, which knows that the result is symmetric (BLAS ``syrk``: half the work); torch does not."""
    if X_TI.device.type != "cpu":
        return X_TI.T @ X_TI
    X = X_TI.numpy()
    return torch.from_numpy(X.T @ X)


@functools.lru_cache(maxsize=2)
def signs(tokens: int, chunk: int, device: torch.device) -> Tensor:
    """float32 [tokens, SKETCH] of random signs, the same for every layer and method."""
    generator = torch.Generator().manual_seed(chunk)
    bits = torch.randint(0, 2, (tokens, SKETCH), generator=generator, dtype=torch.int8)
    return bits.to(device).float().mul_(2).sub_(1)


class Statistics:
    """Accumulates ``wanted`` (names of fields of `Inputs`) and always a sketch, for the layer errors."""

    def __init__(self, name: str, wanted: set[str], token_clip: float | None) -> None:
        self.name, self.wanted, self.token_clip = name, wanted, token_clip
        self.tokens = self.chunks = 0
        self.values: dict[str, Tensor] = {}

    def add(self, X: Tensor) -> None:
        """``X`` [..., I] in any float type. CellError naming the layer if it is not finite."""
        X_TI = X.detach().float().reshape(-1, X.shape[-1])
        self._sum("sketch", X_TI.T @ signs(len(X_TI), self.chunks, X_TI.device))
        if not bool(torch.isfinite(self.values["sketch"]).all()):  # every entry of X is in it
            raise CellError(f"{self.name}: its input is not finite on the calibration set")
        X_TI = clip_tokens(X_TI.view(X.shape), self.token_clip).view(X_TI.shape)
        if "gram" in self.wanted:
            self._sum("gram", gram(X_TI))
        if "norm" in self.wanted:
            # A sequence in float32 and the rest in float64: next to a massive first token a running float32 sum loses the others.
            self._sum("norm", X_TI.view(-1, X.shape[-2], X.shape[-1]).square().sum(1).double().sum(0))
        if "mean_abs" in self.wanted:
            self._sum("mean_abs", X_TI.abs().sum(0))
        if "max_abs" in self.wanted:
            new = X_TI.abs().amax(0)
            self.values["max_abs"] = torch.maximum(self.values.get("max_abs", new), new)
        self.tokens += len(X_TI)
        self.chunks += 1

    def _sum(self, key: str, value: Tensor) -> None:
        if key in self.values:
            self.values[key] += value
        else:
            self.values[key] = value

    def finish(self) -> dict[str, Tensor]:
        """Fields of `Inputs` by name."""
        out = dict(self.values)
        out["sketch"] = out["sketch"] / SKETCH**0.5
        if "norm" in out:
            out["norm"] = out["norm"].sqrt().float()
        if "mean_abs" in out:
            out["mean_abs"] = out["mean_abs"] / self.tokens
        return out
