"""The benchmark's bookkeeping: what it writes from a measurement (its timings need a GPU)."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
import torch

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_kernels", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def result(bench):
    make = lambda kernel, tokens, us: bench.row("2:4", kernel, 5120, 13824, tokens, us, 40.0, 80_000_000, 1e-4, 4e12)
    return {
        "device": "a GPU",
        "versions": {"torch": "2", "triton": "3", "cuda": "12"},
        "copy_bandwidth": 4e12,
        "rows": [make("sp24_mma", 1, 25.0), make("nm_gemv", 1, 20.0), make("sp24_mma", 8, 30.0), make("sp24_mma", 256, 50.0)],
        "not_measured": [["bitmap", 5120, 13824]],
    }


def test_dispatch_table_takes_what_beats_dense(bench, result):
    (entry,) = bench.dispatch(result)["entries"]
    assert (entry["device"], entry["format"], entry["rows"], entry["columns"]) == ("a GPU", "2:4", 5120, 13824)
    assert dict(map(tuple, entry["tokens"])) == {
        1: "nm_gemv", 4: "dense", 8: "sp24_mma", 16: "dense", 32: "dense", 64: "dense", 256: "dense", 2048: "dense",
    }  # fmt: skip


def test_table_and_plot(bench, result, tmp_path):
    text = bench.table(result)
    assert "| 2:4 | nm_gemv | 5120 x 13824 | 1 | 20.0 | 40.0 | 2.00 | 80.0 | 100% | 1.0e-04 |" in text
    assert "Not measured: bitmap 5120 13824" in text
    bench.plot(result, str(tmp_path / "k.svg"))
    assert (tmp_path / "k.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("format", ["2:4", "4:8", "8:16", "bitmap", "int3", "int4", "int8", "2:4+int4"])
def test_its_weights_are_of_their_format(bench, format):
    packed = bench.weight(32, 256, format, "cpu")
    assert packed.format == format
    assert bench.clone(packed).tensors.keys() == packed.tensors.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would measure")
def test_without_a_gpu_it_says_so(tmp_path):
    out = tmp_path / "r.json"
    run = subprocess.run([sys.executable, str(PATH), "run", str(out)], capture_output=True, text=True)
    assert run.returncode == 1
    assert "no CUDA device" in run.stderr
    assert not out.exists()
    empty = {"device": "d", "versions": {"torch": "2", "triton": "3", "cuda": "12"}, "copy_bandwidth": 1e12}
    out.write_text(json.dumps({**empty, "rows": [], "not_measured": []}))
    assert subprocess.run([sys.executable, str(PATH), "table", str(out)], capture_output=True).returncode == 0
