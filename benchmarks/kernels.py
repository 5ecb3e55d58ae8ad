"""Time every kernel beside cuBLAS and cuSPARSELt on one GPU; write a table, a plot and the dispatch table.

    python benchmarks/kernels.py run kernels.json            # needs a GPU of capability 8.0 or newer, torch and triton alone
    python benchmarks/kernels.py table kernels.json          # Markdown for docs/kernels.md
    python benchmarks/kernels.py plot kernels.json kernels.svg
    python benchmarks/kernels.py dispatch kernels.json       # rewrites kernels/dispatch.json from the measurement

Method: bfloat16; each figure is the median of CUDA-graph replays that walk over enough copies of a weight to leave the second-level
cache (at least four times its size, at least two copies), so that weights come from memory as they do in a model, and launch gaps
are those of a graph. Relative error is against float64 of the same packed weight. Bandwidth is a fraction of a measured copy.
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
try:
    import comptrust  # noqa: F401
except ModuleNotFoundError:  # a bare GPU machine: the checkout is the package
    package = types.ModuleType("comptrust")
    package.__path__ = [str(ROOT)]
    sys.modules["comptrust"] = package

import torch
import torch.nn.functional as F
from comptrust.kernels.dispatch import KERNELS, TABLE, unreachable
from comptrust.kernels.formats import FORMATS, Packed, pack, packed_bytes, unpack
from comptrust.kernels.layouts import arrange, cannot
from comptrust.kernels.matmul import run as run_kernel

#: rows, columns of the linears of Llama-2-7B and Llama-2-13B
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (5120, 5120), (13824, 5120), (5120, 13824)]
TOKENS = [1, 4, 8, 16, 32, 64, 256, 2048]
GROUP = 128
SPARSITY = 0.6  # of the unstructured case
WIN = 1.02  # a kernel must beat dense by more than timing noise to enter the dispatch table


def weight(rows: int, columns: int, format: str, device) -> Packed:
    """A random weight of the format, packed on the device."""
    spec = FORMATS[format]
    g = torch.Generator(device=device).manual_seed(0)
    rand = lambda *s: torch.rand(*s, generator=g, device=device)
    keep = None
    if spec.keep:
        order = rand(rows, columns // spec.of, spec.of).argsort(-1)
        keep = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., : spec.keep], True).view(rows, columns)
    elif format == "bitmap":
        keep = rand(rows, columns) >= SPARSITY
    if not spec.bits:
        W = torch.randn(rows, columns, generator=g, device=device).bfloat16()
        return pack(torch.where(keep, W, 0), format)
    scale = (rand(rows, columns // GROUP) + 0.5).bfloat16() / 2**spec.bits
    zero = (rand(rows, columns // GROUP) * 2**spec.bits).floor()
    codes = (rand(rows, columns) * 2**spec.bits).floor()
    W = ((codes - zero.repeat_interleave(GROUP, 1)) * scale.float().repeat_interleave(GROUP, 1)).bfloat16()
    return pack(W if keep is None else torch.where(keep, W, 0), format, scale=scale, zero=zero, group_size=GROUP)


def clone(packed: Packed) -> Packed:
    return Packed(
        packed.format,
        packed.shape,
        packed.dtype,
        {k: t.clone() for k, t in packed.tensors.items()},
        packed.group_size,
        packed.layout,
    )


def median_us(calls, repeats: int = 15) -> float:
    """Median microseconds of one call, the calls replayed in order as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop) / len(calls))
    return statistics.median(times[2:])


def copies(size: int, device) -> int:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // size))


def copy_bandwidth(device) -> float:
    """Bytes a second that a device copy moves, read and write counted."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / (median_us([lambda: b.copy_(a)]) * 1e-6)


def measure(device, seconds: float) -> dict:
    """All rows; stops before ``seconds`` are over and says what is missing."""
    started = time.monotonic()
    out = {
        "device": torch.cuda.get_device_name(device),
        "versions": {"torch": torch.__version__, "triton": __import__("triton").__version__, "cuda": torch.version.cuda},
        "copy_bandwidth": copy_bandwidth(device),
        "rows": [],
        "not_measured": [],
    }
    for rows, columns in SHAPES:
        dense = [torch.randn(rows, columns, device=device).bfloat16() for _ in range(copies(2 * rows * columns, device))]
        xs = {T: torch.randn(T, columns, device=device).bfloat16() for T in TOKENS}
        base = {T: median_us([lambda W=W, x=xs[T]: F.linear(x, W) for W in dense]) for T in TOKENS}
        size = dense[0].numel() * 2
        for T in TOKENS:
            out["rows"].append(row("dense", "cublas", rows, columns, T, base[T], base[T], size, 0.0, out["copy_bandwidth"]))
        del dense
        for format in FORMATS:
            if time.monotonic() - started > seconds:
                out["not_measured"].append([format, rows, columns])
                continue
            one_format(out, format, rows, columns, xs, base, device)
            torch.cuda.empty_cache()
    return out


def one_format(out, format: str, rows: int, columns: int, xs, base, device) -> None:
    packed = weight(rows, columns, format, device)
    W = unpack(packed)
    exact = {T: xs[T][:64].double() @ W.double().T for T in TOKENS}
    scale = {T: xs[T][:64].double().abs() @ W.double().abs().T for T in TOKENS}
    error = lambda y, T: float((y[:64].double() - exact[T]).norm() / scale[T].norm())
    for kernel in (k for k in KERNELS.values() if format in k.formats):
        if reason := cannot(packed, kernel.layout):
            out["not_measured"].append([kernel.name, rows, columns, reason])
            continue
        first = arrange(packed, kernel.layout)
        size = packed_bytes(first)
        many = [first, *(clone(first) for _ in range(copies(size, device) - 1))]
        for T in TOKENS:
            if unreachable(kernel, first, T, device):
                continue
            y = run_kernel(kernel, xs[T], first)
            us = median_us([lambda k=kernel, x=xs[T], p=p: run_kernel(k, x, p) for p in many])
            out["rows"].append(
                row(format, kernel.name, rows, columns, T, us, base[T], size, error(y, T), out["copy_bandwidth"])
            )


def row(format, kernel, rows, columns, tokens, us, dense_us, weight_bytes, error, bandwidth) -> dict:
    moved = weight_bytes + 2 * tokens * (rows + columns)
    return {
        "format": format, "kernel": kernel, "rows": rows, "columns": columns, "tokens": tokens, "us": us, "dense_us": dense_us,
        "speedup": dense_us / us, "bytes": moved, "bandwidth": moved / (us * 1e-6) / bandwidth, "error": error,
    }  # fmt: skip


def table(result: dict) -> str:
    """The measurement as Markdown."""
    v = result["versions"]
    lines = [
        f"{result['device']}, torch {v['torch']}, triton {v['triton']}, CUDA {v['cuda']}; "
        f"copy bandwidth {result['copy_bandwidth'] / 1e12:.2f} TB/s; bfloat16",
        "",
        "| format | kernel | rows x columns | tokens | us | dense us | speed-up | MB moved | of copy bandwidth | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['format']} | {r['kernel']} | {r['rows']} x {r['columns']} | {r['tokens']} | {r['us']:.1f} | {r['dense_us']:.1f} "
            f"| {r['speedup']:.2f} | {r['bytes'] / 1e6:.1f} | {r['bandwidth']:.0%} | {r['error']:.1e} |"
        )
    lines += [f"\nNot measured: {' '.join(map(str, m))}" for m in result["not_measured"]]
    return "\n".join(lines)


def dispatch(result: dict) -> dict:
    """``kernels/dispatch.json`` from a measurement: for each weight the fastest kernel that beats dense, by number of tokens."""
    best: dict[tuple, dict[int, tuple[float, str]]] = {}
    for r in result["rows"]:
        if r["kernel"] not in KERNELS:
            continue
        tokens = best.setdefault((r["format"], r["rows"], r["columns"]), {})
        if r["speedup"] > tokens.get(r["tokens"], (WIN, ""))[0]:
            tokens[r["tokens"]] = (r["speedup"], r["kernel"])
    entries = []
    for (format, rows, columns), tokens in sorted(best.items()):
        if tokens:
            steps = [[T, tokens[T][1] if T in tokens else "dense"] for T in TOKENS]
            entries.append(
                {
                    "device": result["device"], "dtype": "bfloat16", "format": format, "rows": rows, "columns": columns,
                    "tokens": steps,
                }
            )  # fmt: skip
    v = result["versions"]
    note = f"Measured by benchmarks/kernels.py on {result['device']} with torch {v['torch']}, triton {v['triton']}, CUDA {v['cuda']}."
    return {"note": note, "entries": entries}


def plot(result: dict, path: str) -> None:
    """Speed-up over dense by tokens, one panel a weight."""
    import altair as alt

    data = [{**r, "weight": f"{r['rows']} x {r['columns']}", "what": f"{r['format']} {r['kernel']}"} for r in result["rows"]]
    chart = (
        alt.Chart(alt.Data(values=data))
        .mark_line(point=True)
        .encode(
            x=alt.X("tokens:Q", scale=alt.Scale(type="log", base=2), title="tokens"),
            y=alt.Y("speedup:Q", title="speed-up over cuBLAS"),
            color=alt.Color("what:N", title="format and kernel"),
        )
        .properties(width=280, height=200)
        .facet("weight:N", columns=3, title=result["device"])
    )
    chart.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table", "plot", "dispatch"])
    parser.add_argument("result", type=pathlib.Path)
    parser.add_argument("picture", nargs="?", default="kernels.svg")
    parser.add_argument(
        "--seconds", type=float, default=540, help="stop measuring after this time; the rest is listed as not measured"
    )
    args = parser.parse_args()
    if args.action == "run":
        if not torch.cuda.is_available():
            sys.exit("no CUDA device: kernels can be compiled and checked here (pytest tests/kernels), not timed")
        args.result.write_text(json.dumps(measure(torch.device("cuda"), args.seconds), indent=1))
        return
    result = json.loads(args.result.read_text())
    if args.action == "table":
        print(table(result))
    elif args.action == "plot":
        plot(result, args.picture)
    else:
        TABLE.write_text(json.dumps(dispatch(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
