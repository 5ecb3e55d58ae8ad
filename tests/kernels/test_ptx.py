"""The compiled PTX of every kernel without wgmma, run on the CPU against float64: inline assembly, fragments and addresses included.

What stays open until a GPU runs: that the hardware reads the fragments and index words of ``mma.sp`` as the PTX ISA and CUTLASS say.
"""

from __future__ import annotations

import importlib

import kernel_cases as ref
import pytest
import torch
from comptrust.kernels.dispatch import KERNELS
from comptrust.kernels.formats import pack
from comptrust.kernels.layouts import STEP, arrange

triton = pytest.importorskip("triton")
compiled = pytest.importorskip("compiled")
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def run(name: str, x, packed):
    module = importlib.import_module(f"comptrust.kernels.{name}")
    with compiled.launches(module, execute=True) as made:
        return module.run(x, arrange(packed, KERNELS[name].layout)), made


CASES = [
    # kernel, format, dtype, tokens, rows, columns, groups of how many steps, zero point
    ("sp24_mma", "2:4", "bf16", 1, 40, 1000, 0, True),  # splits, last step cut
    ("sp24_mma", "2:4", "fp16", 5, 33, 96, 0, True),
    ("sp24_mma", "2:4", "bf16", 11, 64, 352, 0, True),  # activations brought into fragments
    ("sp24_mma", "2:4", "fp16", 70, 32, 64, 0, True),  # two blocks of tokens
    ("int_mma", "int4", "bf16", 1, 40, 1100, 2, True),
    ("int_mma", "int4", "fp16", 9, 33, 192, 1, False),
    ("int_mma", "int8", "bf16", 3, 40, 116, 2, False),
    ("int_mma", "int8", "fp16", 1, 32, 96, 99, True),
    ("int_mma", "int3", "bf16", 2, 40, 200, 1, True),
    ("int_mma", "int3", "fp16", 1, 32, 128, 2, False),
    ("int_mma", "2:4+int4", "bf16", 1, 40, 640, 1, True),
    ("int_mma", "2:4+int4", "fp16", 20, 33, 300, 99, True),
    ("nm_gemv", "2:4", "bf16", 1, 20, 1024, 0, True),
    ("nm_gemv", "8:16", "bf16", 3, 9, 96, 0, True),
    ("nm_gemv", "4:8", "fp16", 4, 9, 96, 0, True),
    ("slice_gemv", "bitmap", "bf16", 1, 40, 600, 0, True),
    ("slice_gemv", "bitmap", "fp16", 4, 33, 130, 0, True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:6])))
def test_against_float64(case):
    name, format, dtype, T, O, I, groups, zero_point = case
    dtype = HALF[dtype]
    kw = {"group_size": STEP[format] * groups, "zero_point": zero_point} if format in ref.BITS else {}
    W, args = ref.weight((O, I), format, dtype=dtype, seed=T + O, **kw)
    x = torch.randn(T, I, generator=torch.Generator().manual_seed(O)).to(dtype)
    y, made = run(name, x, pack(W, format, **args))
    assert made[0].name == name
    assert y.dtype == dtype
    assert ref.error(y, x, W) < ref.BOUND[str(dtype)]


@pytest.mark.parametrize(
    ("name", "format"),
    [("sp24_mma", "2:4"), ("int_mma", "int4"), ("int_mma", "int3"), ("int_mma", "2:4+int4"), ("slice_gemv", "bitmap")],
)
def test_one_hot(name, format):
    for W, x, want in ref.probes(128, 2):
        y, _ = run(name, x, pack(W, format, **ref.identity_scale(W.shape[0], format)))
        assert torch.equal(y, want)


@pytest.mark.parametrize(
    ("format", "code", "zero"), [(f, c, z) for f, b in ref.BITS.items() for c, z in ((0, 1 << b), (2**b - 1, 0))]
)
def test_extreme_zero_points(format, code, zero):
    """The range in which codes and zero points meet exactly in 16 bits, at both ends."""
    value = float(code - min(zero, 255))
    W = torch.full((32, STEP[format]), value).bfloat16()
    if format.startswith("2:4"):
        W = torch.where(ref.pattern_mask(tuple(W.shape), "2:4", 0), W, 0)
    kw = {"scale": torch.ones(32, 1).bfloat16(), "zero": torch.full((32, 1), min(zero, 255))}
    x = torch.ones(1, W.shape[1]).bfloat16()
    y, _ = run("int_mma", x, pack(W, format, **kw))
    assert torch.equal(y, (x.double() @ W.double().T).bfloat16())


def test_splits_are_added_in_order():
    """The second pass runs too, and equal inputs give equal bits."""
    W, _ = ref.weight((32, 2048), "2:4", dtype=torch.bfloat16)
    x = torch.randn(2, 2048).bfloat16()
    packed = pack(W, "2:4")
    y, made = run("sp24_mma", x, packed)
    assert [m.name for m in made] == ["sp24_mma", "sum_splits"]
    assert made[0].grid[1] > 1
    assert torch.equal(y, run("sp24_mma", x, packed)[0])


def test_reading_outside_a_buffer_is_seen():
    """The test bed itself: a weight one step short must raise."""
    W, _ = ref.weight((32, 64), "2:4", dtype=torch.float16)
    packed = arrange(pack(W, "2:4"), "fragments")
    packed.tensors["values"] = packed.tensors["values"][: packed.tensors["values"].numel() // 2].contiguous()
    with pytest.raises(IndexError, match="read or written"):
        run("sp24_mma", torch.randn(1, 64).half(), packed)


def test_unordered_metadata_is_seen():
    W, _ = ref.weight((32, 64), "2:4", dtype=torch.float16)
    packed = arrange(pack(W, "2:4"), "fragments")
    packed.tensors["index"].zero_()
    with pytest.raises(ValueError, match="not ordered"):
        run("sp24_mma", torch.randn(1, 64).half(), packed)
