"""Packing: bit-exact, counted, and refused with the place where it cannot be."""

from __future__ import annotations

import kernel_cases as ref
import pytest
import torch
from comptrust.kernels.formats import FORMATS, bits_per_weight, format_for, pack, packed_bytes, unpack, unpack_rows
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


@settings(max_examples=120, deadline=None)
@given(
    format=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    quads=st.integers(1, 40),
    group=st.sampled_from([4, 16, 32, 60, 400]),
    zero_point=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_round_trip_is_bit_exact(format, dtype, rows, quads, group, zero_point, seed):
    W, kw = ref.weight((rows, quads * 4), format, dtype=dtype, seed=seed, group_size=group, zero_point=zero_point)
    packed = pack(W, format, **kw)
    assert torch.equal(bits(unpack(packed)), bits(W))
    a = seed % rows
    assert torch.equal(bits(unpack_rows(packed, a, rows)), bits(W[a:]))


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(["2:4", "4:8", "8:16", "bitmap"]),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    seed=st.integers(0, 10_000),
)
def test_special_values_and_ragged_columns(format, dtype, rows, columns, seed):
    """-0.0, NaN, infinity, denormals and all-zero groups, at every width, also where the last group is cut short."""
    pool = torch.tensor([0.0, 0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-7, -1.5]).to(dtype)
    W = pool[torch.randint(0, 8, (rows, columns), generator=torch.Generator().manual_seed(seed))]
    W = torch.where(ref.pattern_mask((rows, columns), format, seed), W, torch.zeros((), dtype=dtype))
    W[0] = 0
    assert torch.equal(bits(unpack(pack(W, format))), bits(W))


def test_negative_zero_without_a_slot_becomes_positive():
    W = torch.tensor([[-0.0, 1.0, 2.0, -0.0], [-0.0, 0.0, 3.0, 0.0]])
    out = unpack(pack(W, "2:4"))
    assert torch.equal(out, W)
    assert not torch.signbit(out[0]).any()  # both slots hold 1 and 2
    assert torch.signbit(out[1]).tolist() == [True, False, False, False]  # a slot was free
    assert torch.equal(torch.signbit(unpack(pack(W, "bitmap"))), torch.signbit(W))


@pytest.mark.parametrize(
    ("format", "expected"),
    [("2:4", 9), ("4:8", 10), ("8:16", 10), ("int3", 3.1875), ("int4", 4.1875), ("int8", 8.1875), ("2:4+int4", 3.1875)],
)
def test_bits_per_weight(format, expected):
    """By hand for 16-bit values: int4 of group 128 is 4 + 16/128 (scale) + 8/128 (whole zero point)."""
    W, kw = ref.weight((64, 512), format, dtype=torch.bfloat16, group_size=128)
    packed = pack(W, format, **kw)
    assert bits_per_weight(packed) == expected
    assert packed_bytes(packed) == sum(t.untyped_storage().nbytes() for t in packed.tensors.values())


def test_bitmap_size_follows_sparsity():
    W, _ = ref.weight((128, 1024), "bitmap", dtype=torch.float16, sparsity=0.6)
    expected = 2 * int((W != 0).sum()) + W.numel() // 8 + 4 * 129
    assert packed_bytes(pack(W, "bitmap")) == expected


def test_many_blocks_equal_one(monkeypatch):
    from comptrust.kernels import formats

    W, kw = ref.weight((200, 64), "2:4+int4", group_size=16)
    whole = pack(W, "2:4+int4", **kw)
    monkeypatch.setattr(formats, "_BLOCK", 32 * 64)
    for name, tensor in pack(W, "2:4+int4", **kw).tensors.items():
        assert torch.equal(tensor, whole.tensors[name]), name
    for format in ("2:4", "bitmap"):
        W, _ = ref.weight((200, 64), format)
        assert torch.equal(unpack(pack(W, format)), W)


@pytest.mark.parametrize(("format", "columns"), [("2:4", "28-31"), ("4:8", "24-31"), ("8:16", "16-31")])
def test_violation_names_row_and_group(format, columns):
    W = torch.zeros(8, 64)
    n, m = ref.PATTERNS[format]
    W[5, 32 - n - 1 : 32] = 1.0
    with pytest.raises(ValueError, match=rf"row 5, group {31 // m} \(columns {columns}\) holds {n + 1} nonzero"):
        pack(W, format)


def test_off_grid_names_row_group_and_column():
    W, kw = ref.weight((8, 64), "int4", group_size=16)
    W[6, 37] += 1e-4
    with pytest.raises(ValueError, match=r"row 6, group 2 \(column 37\)"):
        pack(W, "int4", **kw)
    W, kw = ref.weight((8, 64), "2:4+int4", group_size=16)
    row, column = (int(i) for i in W.nonzero()[-1])
    W[row, column] += 1e-4
    with pytest.raises(ValueError, match=rf"row {row}, group {column // 16} \(column {column}\)"):
        pack(W, "2:4+int4", **kw)


def test_bfloat16_codes_that_round_together():
    """Near code 255 a bfloat16 product is half a step wide: a value may not name its code, but must come back exactly."""
    scale = torch.full((1, 1), 0.0123).bfloat16()
    W = (torch.arange(256.0) * scale.float()).bfloat16()
    packed = pack(W, "int8", scale=scale, zero=torch.zeros(1, 1))
    assert torch.equal(unpack(packed), W)


def test_zero_scale_group():
    packed = pack(torch.zeros(2, 8), "int4", scale=torch.tensor([[0.0], [1.0]]))
    assert torch.equal(unpack(packed), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="row 0"):
        pack(torch.ones(1, 8), "int4", scale=torch.zeros(1, 1))


def test_fractional_zero_point_is_kept():
    scale, zero = torch.full((2, 2), 0.1), torch.tensor([[7.5, 3.25], [0.5, 8.0]])
    codes = torch.randint(0, 16, (2, 16))
    W = (codes - zero.repeat_interleave(8, 1)) * scale.repeat_interleave(8, 1)
    packed = pack(W, "int4", scale=scale, zero=zero, group_size=8)
    assert packed.tensors["zero"].dtype == torch.float32
    assert torch.equal(unpack(packed), W)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pack(torch.ones(2, 8), "1:4"), "unknown format '1:4'; formats are 2:4, 4:8"),
        (lambda: pack(torch.ones(2, 8, dtype=torch.float64), "2:4"), "supports torch.float16, torch.bfloat16, torch.float32"),
        (lambda: pack(torch.ones(2, 8, dtype=torch.int8), "int8", scale=torch.ones(2, 1)), "got torch.int8"),
        (lambda: pack(torch.ones(8), "bitmap"), "two non-empty dimensions"),
        (lambda: pack(torch.ones(0, 8), "bitmap"), "two non-empty dimensions"),
        (lambda: pack(torch.ones(2, 8), "int4"), r"int4 needs scale \[2, 1\]"),
        (lambda: pack(torch.ones(2, 8), "int4", scale=torch.ones(2, 3), group_size=4), r"scale must be \[2, 2\]"),
        (lambda: pack(torch.ones(2, 8), "int4", scale=torch.ones(2, 1, dtype=torch.int32)), "scale must be one of"),
        (lambda: pack(torch.ones(2, 8), "int4", scale=torch.tensor([[1.0], [float("nan")]])), "scale of row 1, group 0 is nan"),
        (lambda: pack(torch.ones(2, 8), "int4", scale=torch.ones(2, 1), group_size=-1), "positive integer or None; got -1"),
        (lambda: pack(torch.zeros(2, 8), "2:4+int4", scale=torch.ones(2, 2), group_size=6), "multiple of 4"),
        (lambda: pack(torch.zeros(2, 8), "2:4", scale=torch.ones(2, 1)), "stores floats"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("pattern", "width", "expected"),
    [
        ("2:4", None, "2:4"), ("unstructured", 16, "bitmap"), ("16:32", None, "bitmap"), (None, 4, "int4"), (None, 2, None),
        ("1:2", None, "2:4"), ("2:4", 4, "2:4+int4"), ("4:8", 4, "int4"), ("unstructured", 3, "int3"), (None, None, None), (None, 16, None),
    ],
)  # fmt: skip
def test_format_for(pattern, width, expected):
    assert format_for(pattern, width) == expected
