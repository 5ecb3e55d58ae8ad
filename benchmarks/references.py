"""The published algorithms, written as published: two forwards a block, sample by sample, column by column.

Stand-ins for the official repositories of Wanda, SparseGPT, GBLM-Pruner and SmoothQuant and for GPTQ's first release, none of which
can be installed as a package. Written from the papers' algorithms and the repositories' stated order of steps; slow on purpose,
independent of the engine, and run in the same process, on the same windows, with the same threads as what they are compared with.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Inputs:
    """Column norms (Wanda) or the second moment (SparseGPT, GPTQ) of one linear's inputs, as a running mean over sequences."""

    def __init__(self, linear: nn.Linear, hessian: bool) -> None:
        self.n = 0
        self.value = torch.zeros(linear.in_features, linear.in_features) if hessian else torch.zeros(linear.in_features)
        self.hessian = hessian

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.value *= self.n / (self.n + 1)
        self.n += 1
        self.value += (2 * x.T @ x if self.hessian else x.square().sum(0)) / self.n


def drop_smallest_n_of_m(mask: Tensor, score: Tensor, n: int, m: int, start: int) -> None:
    worst = torch.topk(score, n, dim=1, largest=False).indices
    mask.scatter_(1, start + worst, True)


def magnitude(W: Tensor, inputs: Inputs | None, sparsity: float, nm: tuple[int, int] | None) -> Tensor:
    score = W.abs()
    drop = torch.zeros_like(W, dtype=torch.bool)
    if nm:
        for i in range(0, W.shape[1], nm[1]):
            drop_smallest_n_of_m(drop, score[:, i : i + nm[1]], nm[1] - nm[0], nm[1], i)
    else:
        drop = score <= score.flatten().sort().values[int(W.numel() * sparsity)]
    return W.masked_fill(drop, 0)


def wanda(W: Tensor, inputs: Inputs, sparsity: float, nm: tuple[int, int] | None, G: Tensor | None = None) -> Tensor:
    score = W.abs() * inputs.value.sqrt()
    if G is not None:  # GBLM
        score += W.abs() * G
    drop = torch.zeros_like(W, dtype=torch.bool)
    if nm:
        for i in range(0, W.shape[1], nm[1]):
            drop_smallest_n_of_m(drop, score[:, i : i + nm[1]], nm[1] - nm[0], nm[1], i)
    else:
        drop.scatter_(1, score.sort(dim=1, stable=True).indices[:, : int(W.shape[1] * sparsity)], True)
    return W.masked_fill(drop, 0)


def factor(H: Tensor, W: Tensor, damping: float) -> Tensor:
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(damping * H.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def sparsegpt(W: Tensor, inputs: Inputs, sparsity: float, nm: tuple[int, int] | None, block: int = 128) -> Tensor:
    W = W.clone()
    U = factor(inputs.value.clone(), W, 0.01)
    for b in range(0, W.shape[1], block):
        e = min(b + block, W.shape[1])
        W1, U1 = W[:, b:e].clone(), U[b:e, b:e]
        Q1, E1 = torch.zeros_like(W1), torch.zeros_like(W1)
        drop = torch.zeros_like(W1, dtype=torch.bool)
        if not nm:
            score = W1.square() / U1.diagonal().square()
            drop = score <= score.flatten().sort().values[int(score.numel() * sparsity)]
        for i in range(e - b):
            if nm and i % nm[1] == 0:
                score = W1[:, i : i + nm[1]].square() / U1.diagonal()[i : i + nm[1]].square()
                drop_smallest_n_of_m(drop, score, nm[1] - nm[0], nm[1], i)
            Q1[:, i] = W1[:, i].masked_fill(drop[:, i], 0)
            error = (W1[:, i] - Q1[:, i]) / U1[i, i]
            W1[:, i:] -= error[:, None] * U1[i, i:]
            E1[:, i] = error
        W[:, b:e] = Q1
        W[:, e:] -= E1 @ U[b:e, e:]
    return W


def gptq(W: Tensor, inputs: Inputs, bits: int, group: int, block: int = 128) -> Tensor:
    W = W.clone()
    U = factor(inputs.value.clone(), W, 0.01)
    Q, top = torch.zeros_like(W), 2 ** (bits - 1)
    for b in range(0, W.shape[1], block):
        e = min(b + block, W.shape[1])
        W1, U1 = W[:, b:e].clone(), U[b:e, b:e]
        E1 = torch.zeros_like(W1)
        for i in range(e - b):
            if (b + i) % group == 0:
                scale = W[:, b + i : b + i + group].abs().amax(1).clamp(min=1e-9) * 2 / (2**bits - 1)
            q = (W1[:, i] / scale).round().clamp(-top, top - 1) * scale
            E1[:, i] = (W1[:, i] - q) / U1[i, i]
            W1[:, i:] -= E1[:, i, None] * U1[i, i:]
            Q[:, b + i] = q
        W[:, e:] -= E1 @ U[b:e, e:]
    return Q


def gradients(model: nn.Module, tokens: Tensor, scale: float = 100.0) -> dict[nn.Module, Tensor]:
    """GBLM-Pruner: the l2 norm over sequences of ``scale`` times the gradient of each linear's weight; the whole model, backwards."""
    linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    squares = {m: torch.zeros_like(m.weight) for m in linears}
    for row in tokens:
        model.zero_grad()
        with torch.enable_grad():
            model.requires_grad_(True)(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        for m in linears:
            squares[m] += (m.weight.grad * scale).square()
    model.zero_grad()
    return {m: s.sqrt() for m, s in squares.items()}


def round_each(x: Tensor, dim: int) -> Tensor:
    """SmoothQuant's int8: one symmetric scale for each row of ``dim``, largest entry 127."""
    scale = x.abs().amax(dim, keepdim=True).clamp(min=1e-5) / 127
    return (x / scale).round() * scale


def smoothquant(model: nn.Module, tokens: Tensor, alpha: float = 0.5) -> None:
    """Scales from the maxima of the dense model's inputs, folded into both norms of a block; every linear of the blocks W8A8, a scale for
    each output and each token. What goes into attention's own products is not rounded."""
    largest: dict[nn.Module, Tensor] = {}

    def see(m: nn.Module, args: tuple) -> None:
        new = args[0].abs().flatten(0, -2).amax(0)
        largest[m] = torch.maximum(largest[m], new) if m in largest else new

    linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_pre_hook(see) for m in linears]
    for row in tokens:
        model(input_ids=row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = [
            (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        ]
        for norm, linears_of_norm in readers:
            weight = torch.stack([m.weight.abs().amax(0) for m in linears_of_norm]).amax(0).clamp(min=1e-5)
            scale = (largest[linears_of_norm[0]].pow(alpha) / weight.pow(1 - alpha)).clamp(min=1e-5)
            norm.weight /= scale
            for m in linears_of_norm:
                m.weight *= scale
    for m in linears:
        m.weight.copy_(round_each(m.weight, 1))
        m.forward = functools.partial(lambda m, x: F.linear(round_each(x, -1), m.weight, m.bias), m)


def by_transformers(folder: str, **quantization) -> nn.Module:
    """What transformers loads with a `BitsAndBytesConfig` of ``quantization``."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=BitsAndBytesConfig(**quantization)
    ).eval()


@torch.no_grad()
def run(model: nn.Module, tokens: Tensor, method: str, **knobs) -> None:
    """Compress a Llama-style ``model`` in place, as the published scripts do. ``tokens`` [n, T]."""
    if method == "smoothquant":
        smoothquant(model, tokens, **knobs)
        return
    if method == "magnitude":
        for layer in model.model.layers:
            for m in layer.modules():
                if isinstance(m, nn.Linear):
                    m.weight.copy_(magnitude(m.weight, None, **knobs))
        return
    body, compress = model.model, globals()["wanda" if method == "gblm" else method]
    G = gradients(model, tokens) if method == "gblm" else {}
    hidden = [body.embed_tokens(row[None]) for row in tokens]
    positions = torch.arange(tokens.shape[1])[None]
    rope = body.rotary_emb(hidden[0], positions)
    for layer in body.layers:
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        seen = {m: Inputs(m, method in ("gptq", "sparsegpt")) for m in linears}
        hooks = [m.register_forward_pre_hook(lambda m, args, seen=seen: seen[m].add(args[0])) for m in linears]

        def forward(h: Tensor, layer: nn.Module = layer) -> Tensor:
            return layer(h, attention_mask=None, position_ids=positions, position_embeddings=rope, use_cache=False)

        for h in hidden:
            forward(h)
        for hook in hooks:
            hook.remove()
        for m in linears:
            m.weight.copy_(compress(m.weight, seen[m], **knobs, **({"G": G[m]} if G else {})))
        hidden = [forward(h) for h in hidden]
