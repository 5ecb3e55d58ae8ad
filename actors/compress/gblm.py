"""GBLM-Pruner: Wanda's score plus the size of the loss gradient of each weight.

Das et al. 2023, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", arXiv:2311.04902, with the l2
norm of the gradients over samples, as their code has it: |w| * (||X_i||_2 / sqrt(n) + scale * ||G||_2), n sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..errors import CellError
from .base import Inputs, Progress, Solution, parse_pattern
from .experts import all_tokens
from .masks import masked
from .structure import clone, decoder_blocks, discover, linears_of, on_device, record, to_device
from .wanda import ScoredConfig, prune

#: The gradients of a mean over tokens are so small that most underflow in float16. A power of two: elsewhere it changes no digit.
LOSS_SCALE = 1024.0


class GblmConfig(ScoredConfig):
    gradient_scale: float = Field(default=100.0, ge=0, description="weight of the gradient term; 0 is Wanda")


class Gradients:
    """||dL/dw||_2 over the calibration sequences, for every linear: [O, I] float32, in host memory."""

    def __init__(self, norms: dict[str, Tensor], samples: int) -> None:
        self.norms, self.samples = norms, samples


def prepare(
    model: nn.Module, linears: dict[str, nn.Linear], config: GblmConfig, *, tokens: Tensor, places: list[torch.device],
    progress: Progress | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of the mean next-token loss of each sequence, block by block from the top: one block's activations at a time.

    The inputs of all blocks and the norms wait in host memory, wherever the model lies: at 128 x 2048 tokens they are several times a
    7B model. Weights need no gradient of their own: that of a linear for one sequence is dY' X, formed where dY arrives. A mixture's
    experts compute every token, and the gradient is 0 from those that the router did not send there.
    """
    with all_tokens(shell := clone(model).eval()):
        return _gradients(shell, linears, tokens, places, progress)


def _gradients(
    shell: nn.Module, linears: dict[str, nn.Linear], tokens: Tensor, places: list[torch.device], progress: Progress | None
) -> Gradients:
    for module in shell.modules():  # the same numbers as parameters of our own: the model's stay as they are
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.detach(), requires_grad=False)
    prefix, blocks = decoder_blocks(shell)
    tokens = tokens.to(next(shell.parameters()).device)
    discover(shell, blocks, tokens[:1, :8], folds=False)  # refuses blocks that cannot be called one by one
    hidden: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]  # input of each block, by sequence
    with torch.no_grad():
        arguments = []
        for row in tokens.split(1):
            first, kwargs = record(shell, blocks, row)
            hidden[0].append(first.cpu())
            arguments = kwargs
        for b, block in enumerate(blocks):
            with on_device(block, places[b], {}):
                kwargs = to_device(arguments[b], places[b])
                hidden[b + 1] = [block(h.to(places[b]), **kwargs).cpu() for h in hidden[b]]
            if progress:
                progress("gradients", b + 1, 2 * len(blocks))
    grads = [_loss_gradient(shell, blocks, row, h) for row, h in zip(tokens.split(1), hidden.pop(), strict=True)]
    norms: dict[str, Tensor] = {}
    for b in reversed(range(len(blocks))):
        block, squares = blocks[b], {}
        hooks = [
            m.register_forward_hook(_gather(squares, n)) for n, m in linears_of(block).items() if f"{prefix}.{b}.{n}" in linears
        ]
        with on_device(block, places[b], {}):
            kwargs = to_device(arguments[b], places[b])
            for i, h in enumerate(hidden.pop()):
                leaf = h.to(places[b]).detach().requires_grad_(True)
                (grad,) = torch.autograd.grad(block(leaf, **kwargs), leaf, grads[i].to(places[b]))
                grads[i] = grad.cpu()
        for hook in hooks:
            hook.remove()
        for n, s in squares.items():
            if not bool(torch.isfinite(s).all()):
                raise CellError(f"{prefix}.{b}.{n}: the gradient of its weights is not finite on the calibration set")
        norms |= {f"{prefix}.{b}.{n}": s.sqrt_().div_(LOSS_SCALE).cpu() for n, s in squares.items()}
        if progress:
            progress("gradients", 2 * len(blocks) - b, 2 * len(blocks))
    return Gradients(norms, len(tokens))


def _loss_gradient(shell: nn.Module, blocks: nn.ModuleList, row: Tensor, top: Tensor) -> Tensor:
    """LOSS_SCALE x d loss / d (output of the last block), for one sequence."""
    leaf = top.to(next(blocks[-1].parameters()).device).detach().requires_grad_(True)
    try:
        for block in blocks:
            block.forward = lambda hidden, **_: hidden
        blocks[-1].forward = lambda hidden, **_: leaf
        logits = shell(input_ids=row, use_cache=False).logits
    finally:
        for block in blocks:
            del block.forward
    loss = F.cross_entropy(logits[0, :-1].float(), row[0, 1:].to(logits.device))
    return torch.autograd.grad(LOSS_SCALE * loss, leaf)[0].cpu()


def _gather(squares: dict[str, Tensor], name: str):
    def after(_: nn.Module, args: tuple, out: Tensor) -> None:
        if not out.requires_grad:  # it only chooses, as the indexer of sparse attention does
            squares[name] = torch.zeros(out.shape[-1], args[0].shape[-1], device=out.device)
            return
        X_TI = args[0].detach().reshape(-1, args[0].shape[-1])

        def arrived(dY: Tensor) -> None:
            G_OI = dY.reshape(-1, dY.shape[-1]).T.float() @ X_TI.float()
            squares[name] = squares[name].addcmul_(G_OI, G_OI) if name in squares else G_OI.square_()

        out.register_hook(arrived)

    return after


def solve(W_OI: Tensor, inputs: Inputs, config: GblmConfig) -> Solution:
    gradients: Gradients = inputs.context
    G_OI = torch.cat([gradients.norms[n] for n in inputs.names]).to(W_OI.device)
    score = W_OI.abs() * (inputs.norm / gradients.samples**0.5 + config.gradient_scale * G_OI)
    return Solution(masked(W_OI, prune(score, config.sparsity, parse_pattern(config.pattern))))
