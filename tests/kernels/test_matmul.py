"""The torch reference against float64, dispatch, and what bad input is told."""

from __future__ import annotations

import json

import kernel_cases as ref
import pytest
import torch
from comptrust.kernels import dispatch, formats
from comptrust.kernels.formats import FORMATS, pack
from comptrust.kernels.layouts import STEP, arrange, cannot
from comptrust.kernels.matmul import matmul
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(sorted(FORMATS)),
    layout=st.sampled_from(["rows", "fragments", "slices"]),
    tokens=st.integers(0, 5),
    rows=st.integers(1, 70),
    quads=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_reference_float64(format, layout, tokens, rows, quads, seed):
    W, kw = ref.weight((rows, 4 * quads), format, dtype=torch.float16, group_size=STEP.get(format, 16), seed=seed)
    packed = pack(W, format, **kw)
    if cannot(packed, layout):
        layout = "rows"
    x = torch.randn(tokens, 4 * quads, generator=torch.Generator().manual_seed(seed)).half()
    y = matmul(x, arrange(packed, layout), "torch")
    assert y.shape == (tokens, rows)
    assert y.dtype == x.dtype
    assert tokens == 0 or ref.error(y, x, W) < 2**-11 + 1e-5  # one output rounded to float16


def test_reference_never_unpacks_everything(monkeypatch):
    """Blocks of rows: the largest dense piece stays far below the weight."""
    from comptrust.kernels import matmul as module

    monkeypatch.setattr(formats, "_BLOCK", 32 * 64)
    seen = []
    original = module.unpack_rows
    monkeypatch.setattr(module, "unpack_rows", lambda p, a, b: seen.append(b - a) or original(p, a, b))
    W, _ = ref.weight((200, 64), "bitmap")
    x = torch.randn(3, 64)
    assert ref.error(matmul(x, pack(W, "bitmap")), x, W) < 1e-6
    assert seen == [32] * 6 + [8]


def packed(format="2:4", dtype=torch.float16, shape=(32, 64), **kw):
    W, args = ref.weight(shape, format, dtype=dtype, **kw)
    return pack(W, format, **args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matmul(torch.zeros(1, 64), packed()), "x must be torch.float16 like the packed weight, got torch.float32"),
        (lambda: matmul(torch.zeros(1, 60).half(), packed()), r"x must be \[tokens, 64\]"),
        (lambda: matmul(torch.zeros(64).half(), packed()), r"x must be \[tokens, 64\]"),
        (lambda: matmul(torch.zeros(1, 64).half(), torch.zeros(32, 64)), r"needs a weight from pack\(\), got Tensor"),
        (
            lambda: matmul(torch.zeros(1, 64).half(), packed(), "cutlass"),
            "unknown backend 'cutlass'; backends are auto, torch, triton",
        ),
        (lambda: matmul(torch.zeros(1, 64).half(), packed(), "triton"), "x is on cpu.*backend='torch' runs anywhere"),
        (
            lambda: matmul(torch.zeros(1, 64), packed(dtype=torch.float32), "triton"),
            "needs float16 or bfloat16, got torch.float32",
        ),
        (
            lambda: matmul(torch.zeros(1, 64).half(), packed(), "int_mma"),
            "int_mma multiplies int3, int4, int8, 2:4.int4, not 2:4",
        ),
        (
            lambda: matmul(torch.zeros(1, 64).half(), packed(), "cusparselt"),
            "needs a weight on a GPU and a torch with cuSPARSELt",
        ),
        (lambda: matmul(torch.zeros(1, 68).half(), packed(shape=(20, 68)), "cusparselt"), "multiples of 16"),
        (lambda: matmul(torch.zeros(9, 64).half(), packed(), "nm_gemv"), "nm_gemv takes up to 4 tokens, got 9"),
        (
            lambda: matmul(torch.zeros(1, 1).half().expand(1 << 20, 4096), packed(shape=(1, 4096)), "sp24_mma"),
            "1048576 tokens by 4096 are too many",
        ),
        (lambda: matmul(torch.zeros(1, 64).half(), packed().to("meta")), "x is on cpu, the packed weight on meta"),
        (lambda: matmul(torch.zeros(1, 64).half(), packed("int4", group_size=48), "int_mma"), "multiple of 64, got 48"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_old_gpus_are_told(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    for kernel in (k for k in dispatch.KERNELS.values() if k.triton):
        reason = dispatch.unreachable(
            kernel, packed(kernel.formats[0], group_size=128, shape=(32, 128)), 1, torch.device("cuda")
        )
        assert reason == f"{kernel.name} needs compute capability 8.0 or newer, Tesla T4 has (7, 5)"


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_format_has_a_kernel(format, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    p = packed(format, shape=(32, 128), group_size=128)
    first = dispatch.reachable(p, 1, torch.device("cuda"))[0].name
    assert first == {"2:4": "sp24_mma", "4:8": "nm_gemv", "8:16": "nm_gemv", "bitmap": "slice_gemv"}.get(format, "int_mma")


def test_auto_follows_the_table(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    tokens = [[8, "sp24_mma"], [64, "dense"]]
    entry = {"device": "NVIDIA H200", "dtype": "float16", "format": "2:4", "rows": 32, "columns": 64, "tokens": tokens}
    path = tmp_path / "dispatch.json"
    path.write_text(json.dumps({"entries": [entry]}))
    monkeypatch.setattr(dispatch, "TABLE", path)
    dispatch.table.cache_clear()
    cuda = torch.device("cuda")
    assert [dispatch.choose(packed(), t, cuda) for t in (1, 8, 9, 64, 65)] == [
        "sp24_mma",
        "sp24_mma",
        "dense",
        "dense",
        "dense",
    ]
    assert dispatch.choose(packed(shape=(64, 64)), 1, cuda) == "dense"  # not measured
    assert dispatch.choose(packed(dtype=torch.bfloat16), 1, cuda) == "dense"
    assert dispatch.choose(packed(), 1, torch.device("cpu")) == "dense"
    dispatch.table.cache_clear()


def test_the_table_names_real_kernels():
    """The one checked in: entries come from a measurement and name what exists."""
    dispatch.table.cache_clear()
    for entry in dispatch.table():
        assert set(entry) == {"device", "dtype", "format", "rows", "columns", "tokens"}
        assert entry["format"] in FORMATS
        assert [most for most, _ in entry["tokens"]] == sorted(most for most, _ in entry["tokens"])
        assert {name for _, name in entry["tokens"]} <= {*dispatch.KERNELS, "dense"}
