"""Layouts hold the same weight, are reversible bit for bit, and agree with CUTLASS and the PTX fragment tables."""

from __future__ import annotations

import kernel_cases as ref
import pytest
import torch
from comptrust.kernels.formats import pack, packed_bytes, unpack, unpack_fields, unpack_rows
from comptrust.kernels.layouts import STEP, arrange, cannot, restore, slice_columns
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as cutlass

HALVES = (torch.float16, torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(sorted(STEP)),
    dtype=st.sampled_from(HALVES),
    rows=st.integers(1, 100),
    quads=st.integers(1, 80),
    groups=st.sampled_from([1, 2, 999]),
    zero_point=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_fragments_are_reversible(format, dtype, rows, quads, groups, zero_point, seed):
    kw = {"group_size": STEP[format] * groups, "zero_point": zero_point} if format in ref.BITS else {}
    W, args = ref.weight((rows, quads * 4), format, dtype=dtype, seed=seed, **kw)
    packed = pack(W, format, **args)
    moved = arrange(packed, "fragments")
    back = restore(moved)
    assert back.tensors.keys() == packed.tensors.keys()
    for name, tensor in packed.tensors.items():
        assert torch.equal(back.tensors[name], tensor), name
    assert torch.equal(unpack(moved), W)
    assert torch.equal(unpack_rows(moved, rows // 2, rows), W[rows // 2 :])


@pytest.mark.parametrize("format", sorted(STEP))
def test_fragments_of_whole_tiles_take_no_byte_more(format):
    W, kw = ref.weight((64, 256), format, dtype=torch.float16, group_size=128)
    packed = pack(W, format, **kw)
    assert packed_bytes(arrange(packed, "fragments")) == packed_bytes(packed)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from((*HALVES, torch.float32)),
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.95, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_slices_are_reversible(dtype, rows, columns, sparsity, seed):
    W, _ = ref.weight((rows, columns), "bitmap", dtype=dtype, sparsity=sparsity, seed=seed)
    packed = pack(W, "bitmap")
    moved = arrange(packed, "slices")
    assert torch.equal(unpack(moved), W)
    assert torch.equal(unpack_rows(moved, rows // 2, rows), W[rows // 2 :])
    back = restore(moved)
    assert all(torch.equal(back.tensors[k], v) for k, v in packed.tensors.items())
    assert int(slice_columns(moved.tensors["words"]).amax() if moved.tensors["words"].numel() else 0) < columns


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 12.5), (0.6, 10.1)])
def test_slices_cost_24_bits_a_nonzero(sparsity, most):
    """24 bits a kept weight plus the padding of rows to the longest of 32 (about 2 sigma of the count)."""
    W, _ = ref.weight((128, 4096), "bitmap", dtype=torch.float16, sparsity=sparsity)
    bits = 8 * packed_bytes(arrange(pack(W, "bitmap"), "slices")) / W.numel()
    assert 24 * (1 - sparsity) < bits < most


def exactly_two(rows: int, columns: int, dtype=torch.float16) -> torch.Tensor:
    W = torch.randn(rows, columns).abs() + 0.5  # no accidental zeros: every group keeps exactly two
    return torch.where(ref.pattern_mask((rows, columns), "2:4", 3), W, 0).to(dtype)


def test_values_and_positions_equal_cutlass():
    W = exactly_two(96, 192)
    sparse, _ = cutlass(W)
    assert torch.equal(pack(W, "2:4").tensors["values"], sparse)


def test_index_words_equal_cutlass():
    """CUTLASS feeds ``mma.sp.m16n8k32`` from the same words: lane 4 g + t holds tile t // 2, half t % 2 of the columns."""
    W = exactly_two(96, 192)
    _, reordered = cutlass(W)
    # ColumnMajorInterleaved<2>: for every 32 columns a run of 2 * rows int16, two a row; 32 rows are the 32 words of one step.
    theirs = reordered.view(torch.int32).view(192 // 32, 96 // 32, 32).transpose(0, 1)
    ours = arrange(pack(W, "2:4"), "fragments").tensors["index"].view(96 // 32, 192 // 32, 32)
    assert torch.equal(ours, theirs)


def test_values_follow_the_ptx_fragment_table():
    """PTX ISA: a_i of lane (g, t) is row g (i in 0,1,4,5) or g + 8, column 2 t + i % 2 (+ 8 from i = 4) of the kept half."""
    W = exactly_two(64, 64)
    packed = pack(W, "2:4")
    kept = packed.tensors["values"]
    ours = arrange(packed, "fragments").tensors["values"].view(2, 2, 2, 32, 8)
    for block, step, tile, lane, i in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 2, 32, 8))).tolist():
        g, t = lane // 4, lane % 4
        row = block * 32 + tile * 16 + g + (0 if i in (0, 1, 4, 5) else 8)
        column = step * 16 + 2 * t + i % 2 + (8 if i >= 4 else 0)
        assert ours[block, step, tile, lane, i] == kept[row, column]


@pytest.mark.parametrize(
    ("format", "kw", "layout", "message"),
    [
        ("4:8", {}, "fragments", "4:8 has no layout 'fragments'"),
        ("2:4", {}, "slices", "belongs to bitmap, not to 2:4"),
        ("2:4", {"dtype": torch.float32}, "fragments", "needs float16 or bfloat16 weights, got torch.float32"),
        ("int4", {"group_size": 48}, "fragments", "multiple of 64, got 48"),
        ("2:4+int4", {"group_size": 64}, "fragments", "multiple of 128, got 64"),
        ("2:4", {}, "columns", "has no layout 'columns'"),
    ],
)
def test_what_cannot_be_arranged_says_why(format, kw, layout, message):
    W, args = ref.weight((32, 256), format, **{"dtype": torch.float16, **kw})
    packed = pack(W, format, **args)
    assert cannot(packed, layout)
    with pytest.raises(ValueError, match=message):
        arrange(packed, layout)


@pytest.mark.parametrize("zero", [7.5, -1.0, 17.0, 201.0])
def test_zero_points_without_exact_arithmetic_stay_in_rows(zero):
    """128 + 201 is no bfloat16: such a zero point must not reach ``int_mma``. 2^bits = 16 is the last that may (GPTQ's off-by-one)."""
    scale, W = torch.ones(32, 1).bfloat16(), torch.full((32, 64), 3 - zero).bfloat16()
    packed = pack(W, "int4", scale=scale, zero=torch.full((32, 1), zero))
    assert torch.equal(unpack(packed), W)
    with pytest.raises(ValueError, match="whole zero points from 0 to 2"):
        arrange(packed, "fragments")


def test_padding_words_are_valid_metadata():
    """0b0000 is undefined for ``mma.sp``; padding must name two different positions."""
    W, kw = ref.weight((5, 36), "2:4+int4", dtype=torch.float16, group_size=36)
    words = arrange(pack(W, "2:4+int4", **kw), "fragments").tensors["index"]
    pairs = unpack_fields(words[None], 2, words.numel() * 16).view(-1, 2)
    assert (pairs[:, 0] < pairs[:, 1]).all()
