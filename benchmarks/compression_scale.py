"""Seconds a block and peak device memory of every method on a random-weight Llama of a real shape, blocks streamed from the host.

    python benchmarks/compression_scale.py [--shape 7b|13b|70b|tiny] [--layers 4] [--samples 128] [--seqlen 2048] [--device cuda]

Blocks are alike, so a few layers tell a block's time and the peak; the whole model takes its number of layers times as long.
Weights are random: perplexity would mean nothing and is not computed.
"""

from __future__ import annotations

import argparse
import time

import torch
from comptrust.actors.compress import compress
from transformers import LlamaConfig, LlamaForCausalLM

#: hidden, intermediate, heads, key-value heads, layers of the whole model
SHAPES = {
    "tiny": (256, 704, 4, 4, 8),
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 64, 8, 80),
}
CELLS = [
    ("rtn", {"bits": 4, "group_size": 64}), ("gptq", {"bits": 4, "group_size": 64}), ("awq", {"bits": 4, "group_size": 64}),
    ("smoothquant", {}), ("magnitude", {"pattern": "2:4"}), ("wanda", {"pattern": "2:4"}), ("sparsegpt", {"sparsity": 0.5}),
    ("sparsegpt", {"pattern": "2:4"}), ("nf4", {}), ("llm_int8", {}),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    hidden, intermediate, heads, kv, whole = SHAPES[args.shape]
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv,
        num_hidden_layers=args.layers, max_position_embeddings=args.seqlen, dtype=dtype,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    tokens = torch.randint(0, 32000, (args.samples, args.seqlen), generator=torch.Generator().manual_seed(0))
    gpu = torch.device(args.device).type == "cuda"
    name = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"{args.shape}, {args.layers} of {whole} layers, {args.samples} x {args.seqlen} tokens, {dtype}, {name}\n")
    print("| method | s a block | s for the whole model | peak device GiB | mean layer error |\n|---|---|---|---|---|")
    for method, params in CELLS:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        label = " ".join([method, *(str(v) for v in params.values())])
        start = time.perf_counter()
        try:
            done = compress(model, method, params, tokens, device=args.device)
        except (ImportError, torch.OutOfMemoryError) as error:  # the other methods still tell something
            print(f"| {label} | {str(error).splitlines()[0]} | | | |", flush=True)
            continue
        if gpu:
            torch.cuda.synchronize()
        block = (time.perf_counter() - start) / args.layers
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if gpu else "-"
        error = sum(row["error"] for row in done.layers) / len(done.layers)
        print(f"| {label} | {block:.2f} | {block * whole:.0f} | {peak} | {error:.4f} |", flush=True)
        del done


if __name__ == "__main__":
    main()
