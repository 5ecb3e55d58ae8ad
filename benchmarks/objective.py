"""Layer objectives ||(W - W')X|| on small layers, beside independent float64 solutions. A few seconds on one core.

    python benchmarks/objective.py [--rows 64] [--inputs 256] [--tokens 1024] [--seeds 3]

Quantisers: round-to-nearest, ours, the published algorithm (`references.py`) and, as a floor, the same grid reached by coordinate
descent in float64 from our answer. Pruners: the exact least squares of our mask, column by column, in float64.
"""

from __future__ import annotations

import argparse

import references
import torch
from comptrust.actors.compress import METHODS
from comptrust.actors.compress.base import Inputs


def problem(rows: int, inputs: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(W [O, I], X [T, I]) float64: correlated inputs of different sizes in random order."""
    g = torch.Generator().manual_seed(seed)
    rank = inputs // 4
    X = torch.randn(tokens, rank, generator=g, dtype=torch.float64) @ torch.randn(
        rank, inputs, generator=g, dtype=torch.float64
    )
    size = torch.logspace(-0.5, 0.5, inputs, dtype=torch.float64)[torch.randperm(inputs, generator=g)]
    X = (X + torch.randn(tokens, inputs, generator=g, dtype=torch.float64)) * size
    return torch.randn(rows, inputs, generator=g, dtype=torch.float64), X


def descend(W: torch.Tensor, H: torch.Tensor, solution, bits: int, group: int, sweeps: int = 10) -> torch.Tensor:
    """Coordinate descent over the codes of ``solution``, scales fixed: no single code can be changed for the better."""
    scale = solution.scale.double().repeat_interleave(group, 1)
    codes = solution.codes.double()
    top = 2 ** (bits - 1)
    for _ in range(sweeps):
        before = codes.clone()
        for i in range(W.shape[1]):
            R = (W - codes * scale) @ H[:, i]
            codes[:, i] = (codes[:, i] + R / (H[i, i] * scale[:, i])).round().clamp(-top, top - 1)
        if torch.equal(before, codes):
            break
    return codes * scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 64), ("inputs", 256), ("tokens", 1024), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| problem | method | relative error ||(W-W')X||/||WX|| | over the published algorithm | over the float64 solution |")
    print("|---|---|---|---|---|")
    for seed in range(args.seeds):
        W, X = problem(args.rows, args.inputs, args.tokens, seed)
        H = X.T @ X
        loss = lambda Q, W=W, X=X: float(((W - Q.double()) @ X.T).norm() / (W @ X.T).norm())
        inputs = Inputs(["w"], [len(W)], gram=H.float(), norm=X.norm(dim=0).float(), mean_abs=X.abs().mean(0).float())
        seen = references.Inputs(torch.nn.Linear(args.inputs, 1), hessian=True)
        seen.add(X.float())

        def row(name: str, Q, published: float | None, solved: float | None, seed=seed, loss=loss) -> None:
            value = loss(Q)
            ratios = [f"{value / r:.3f}" if r else "" for r in (published, solved)]
            print(f"| {args.rows} x {args.inputs}, seed {seed} | {name} | {value:.4f} | {ratios[0]} | {ratios[1]} |")

        solve = lambda method, inputs=inputs, W=W, **params: METHODS[method].solve(
            W.float(), inputs, METHODS[method].config(**params)
        )
        for bits in (4, 3, 2):
            published = references.gptq(W.float(), seen, bits, 64)
            ours = solve("gptq", bits=bits, group_size=64)
            floor = loss(descend(W, H, ours, bits, 64))
            row(f"rtn {bits} g64", solve("rtn", bits=bits, group_size=64).W_OI, loss(published), floor)
            row(f"gptq {bits} g64, published", published, loss(published), floor)
            row(f"gptq {bits} g64, ours", ours.W_OI, loss(published), floor)
        for params in ({"sparsity": 0.5}, {"pattern": "2:4"}):
            nm = (2, 4) if "pattern" in params else None
            published = references.sparsegpt(W.float(), seen, 0.5, nm)
            ours = solve("sparsegpt", **params).W_OI.double()
            best = torch.zeros_like(W)
            for o in range(len(W)):
                kept = ours[o] != 0
                best[o, kept] = torch.linalg.lstsq(X[:, kept], X @ W[o]).solution
            label = params.get("pattern", "50%")
            row(f"wanda {label}", solve("wanda", **params).W_OI, loss(published), loss(best))
            row(f"sparsegpt {label}, published", published, loss(published), loss(best))
            row(f"sparsegpt {label}, ours", ours, loss(published), loss(best))


if __name__ == "__main__":
    main()
