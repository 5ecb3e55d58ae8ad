"""Packed weight formats: what is stored, bit for bit, and how many bytes it takes.

Shape suffixes: O output features (rows), I input features (columns), G quantisation groups of a row, R rows of a block.
A *word* is an int32 holding equal bit fields, the first field in the lowest bits.

| format   | tensors (layout ``rows``)                                                      | bits a weight (16-bit values)   |
|----------|--------------------------------------------------------------------------------|---------------------------------|
| 2:4      | values [O, I/2]; index words [O, I/32], two 2-bit positions a group of 4       | 9                               |
| 4:8 8:16 | values [O, I/2]; index words [O, I/16], eight 4-bit positions a group of 16    | 10                              |
| bitmap   | values [nonzeros], row after row; mask words [O, I/32]; offsets [O+1]          | 16 (1 - sparsity) + 1           |
| int4/int8| code words [O, I/8] or [O, I/4]; scale [O, G]; zero [O, G] if given            | 4 or 8, plus scale and zero     |
| int3     | low words [O, I/16] (2 bits), high words [O, I/32] (1 bit); scale; zero        | 3, plus scale and zero          |
| 2:4+int4 | code words [O, I/16] of the kept weights; index words as 2:4; scale; zero      | 3, plus scale and zero          |

Columns are padded to whole words; ``packed_bytes`` counts the padding. A 4:8 row also satisfies 8:16, so both share one
layout and one kernel: 4-bit positions cost 10 bits a weight where a mask would cost 9, and need no rank computation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_BLOCK = 1 << 22  # weights handled at once: bounds the int64 temporaries of packing to some 100 MB


@dataclasses.dataclass(frozen=True)
class Format:
    """``keep`` of ``of`` consecutive weights may be nonzero (0: any); ``bits``: width of integer codes (0: floats)."""

    name: str
    keep: int = 0
    of: int = 0
    bits: int = 0


#: Every format by name.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("2:4", 2, 4),
        Format("4:8", 4, 8),
        Format("8:16", 8, 16),
        Format("bitmap"),
        Format("int3", bits=3),
        Format("int4", bits=4),
        Format("int8", bits=8),
        Format("2:4+int4", 2, 4, 4),
    )
}


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed weight of ``shape`` (O, I) and element type ``dtype``; ``tensors`` by name are exactly the stored bytes."""

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: dict[str, torch.Tensor]
    group_size: int | None = None
    layout: str = "rows"
    #: Copies in other layouts that ``matmul`` made for a kernel; ``CompressedLinear`` holds one layout only and needs none.
    arranged: dict[str, Packed] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def to(self, device: torch.device | str) -> Packed:
        return dataclasses.replace(self, tensors={k: t.to(device) for k, t in self.tensors.items()})


def packed_bytes(packed: Packed) -> int:
    """Bytes of everything stored: values or codes, indices, masks, offsets, scales, zero points, padding."""
    return sum(t.numel() * t.element_size() for t in packed.tensors.values())


def bits_per_weight(packed: Packed) -> float:
    """Stored bits for each position of the dense weight."""
    return 8 * packed_bytes(packed) / (packed.shape[0] * packed.shape[1])


def format_for(pattern: str | None, bits: int | None) -> str | None:
    """The smallest format here that holds weights of this pattern and width, or None: dense 16-bit storage is all there is.

    ``pattern`` is ``unstructured``, ``N:M`` or None; ``bits`` an integer width or None (16 and 32 mean none). 1:2 is a
    case of 2:4; any other N:M without a format of its own is a bitmap. Integer codes under a pattern that has no combined format
    are stored with their zeros.
    """
    pattern = "2:4" if pattern == "1:2" else pattern
    if bits in (None, 16, 32):
        return None if pattern is None else pattern if pattern in FORMATS else "bitmap"
    if f"{pattern}+int{bits}" in FORMATS:
        return f"{pattern}+int{bits}"
    return f"int{bits}" if f"int{bits}" in FORMATS else None


def pack(
    W_OI: torch.Tensor,
    format: str,
    *,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    group_size: int | None = None,
) -> Packed:
    """Pack a weight that already lies on the pattern and the grid of ``format``.

    ``scale`` and ``zero`` [O, ceil(I / group_size)] belong to the integer formats, whose weights are
    ``(code - zero) * scale`` computed in float32 and rounded to the dtype of ``W_OI``; codes are 0 .. 2^bits-1;
    without ``zero`` it is 2^(bits-1) everywhere. ``group_size`` None is one group a row.

    Bit-exact: ``unpack(pack(W)) == W``, NaN and infinity included. One exception, where formats have no room for it: a ``-0.0``
    becomes ``+0.0`` in integer formats, and in N:M groups whose slots are all taken by nonzero weights.

    Raises:
        ValueError: unknown format, dtype or shape; a weight off the pattern or off the grid, naming row, group and columns.
    """
    spec = _spec(format)
    if not isinstance(W_OI, torch.Tensor) or W_OI.dim() != 2 or 0 in W_OI.shape:
        raise ValueError(f"pack needs a weight of two non-empty dimensions, got {tuple(getattr(W_OI, 'shape', ()))}")
    if W_OI.dtype not in FLOATS:
        raise ValueError(f"pack supports {', '.join(map(str, FLOATS))}; got {W_OI.dtype}")
    O, I = W_OI.shape
    W_OI = W_OI.detach().contiguous()
    if not spec.bits:
        if scale is not None or zero is not None or group_size is not None:
            raise ValueError(f"{format} stores floats: scale, zero and group_size belong to int3, int4, int8 and 2:4+int4")
        return Packed(format, (O, I), W_OI.dtype, _bitmap(W_OI) if not spec.keep else _nm(W_OI, spec))
    group = _group_size(group_size, spec, I)
    scale_OG, zero_OG = _scales(scale, zero, O, -(-I // group), W_OI, format)
    tensors = _codes(W_OI, spec, scale_OG, zero_OG, group)
    tensors["scale"] = scale_OG
    if zero_OG is not None:
        tensors["zero"] = zero_OG
    return Packed(format, (O, I), W_OI.dtype, tensors, group)


def unpack(packed: Packed) -> torch.Tensor:
    """The stored weight [O, I] in ``packed.dtype``."""
    if packed.layout in ("fragments", "library"):
        from .layouts import restore

        packed = restore(packed)
    return torch.cat([unpack_rows(packed, a, b) for a, b in row_blocks(*packed.shape)])


def unpack_rows(packed: Packed, start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of the stored weight [stop - start, I]; layouts ``rows`` and ``slices`` read no others."""
    if packed.layout != "rows":
        from . import layouts

        if packed.layout == "slices":
            return layouts.slice_rows(packed, start // layouts.ROWS * layouts.ROWS, stop)[start % layouts.ROWS :]
        return unpack_rows(layouts.restore(packed), start, stop)
    spec, (_, I) = _spec(packed.format), packed.shape
    group = packed.group_size or I
    t = {k: v if k in ("values", "offsets") and packed.format == "bitmap" else v[start:stop] for k, v in packed.tensors.items()}
    if packed.format == "bitmap":
        mask_RI = unpack_fields(t["mask"], 1, I).bool()
        W_RI = torch.zeros(mask_RI.shape, dtype=packed.dtype, device=mask_RI.device)
        a, b = int(t["offsets"][start]), int(t["offsets"][stop])
        W_RI[mask_RI] = t["values"][a:b]
        return W_RI
    if not spec.keep:
        return dequantize(read_codes(t, spec.bits, I), t["scale"], t.get("zero"), spec.bits, group, packed.dtype)
    per, width = _slots(spec)
    index = unpack_fields(t["index"], width, t["index"].shape[1] * (32 // width))
    if not spec.bits:
        values = t["values"]
    else:
        values = dequantize(
            read_codes(t, spec.bits, index.shape[1]), t["scale"], t.get("zero"), spec.bits, group // 2, packed.dtype
        )
    R, groups = index.shape[0], index.shape[1] // per
    W = torch.zeros(R, groups, per * 2, dtype=packed.dtype, device=index.device)
    W.scatter_(-1, index.view(R, groups, per).long(), values.view(R, groups, per))
    return W.view(R, groups * per * 2)[:, :I].contiguous()


def dequantize(codes_RI, scale_RG, zero_RG, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """``(code - zero) * scale`` in float32, rounded once to ``dtype``; this is the meaning of every integer format."""
    columns = codes_RI.shape[1]
    s = _spread(scale_RG, group, columns).float()
    z = 1 << (bits - 1) if zero_RG is None else _spread(zero_RG, group, columns).float()
    return ((codes_RI - z) * s).to(dtype)


def pack_fields(codes_RC: torch.Tensor, width: int) -> torch.Tensor:
    """Integers below 2^width [R, C] -> int32 words [R, ceil(C / (32/width))], zeros behind the last."""
    per = 32 // width
    codes = F.pad(codes_RC.long(), (0, -codes_RC.shape[1] % per)).view(codes_RC.shape[0], -1, per)
    words = (codes << torch.arange(0, 32, width, device=codes.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack_fields(words_RC: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """int32 words -> their first ``columns`` fields a row, int32."""
    shifts = torch.arange(0, 32, width, device=words_RC.device, dtype=torch.int32)
    return ((words_RC[:, :, None] >> shifts) & ((1 << width) - 1)).flatten(1)[:, :columns]


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that hold about 4 million weights, in multiples of 32 rows."""
    step = max(1, _BLOCK // (32 * columns)) * 32
    return ((a, min(a + step, rows)) for a in range(0, rows, step))


# -- N:M ------------------------------------------------------------------------------------------------------------------


def _slots(spec: Format) -> tuple[int, int]:
    """Kept weights of a stored group and the bits of a position in it; a stored group has twice as many columns."""
    return (2, 2) if spec.of == 4 else (8, 4)


def _nm(W_OI: torch.Tensor, spec: Format) -> dict[str, torch.Tensor]:
    values, index = zip(*(_nm_rows(W_OI[a:b], spec, a) for a, b in row_blocks(*W_OI.shape)), strict=True)
    width = _slots(spec)[1]
    return {"values": torch.cat(values), "index": torch.cat([pack_fields(i, width) for i in index])}


def _nm_rows(W_RI: torch.Tensor, spec: Format, first_row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept values and their positions, both [R, padded I / 2]; columns are padded to whole index words."""
    per, width = _slots(spec)
    R, I = W_RI.shape
    W = F.pad(W_RI, (0, -I % (32 // width * 2)))
    count = (W.view(R, -1, spec.of) != 0).sum(-1)
    if (count > spec.keep).any():
        row, group = (int(i) for i in (count > spec.keep).nonzero()[0])
        a = group * spec.of
        raise ValueError(
            f"row {first_row + row}, group {group} (columns {a}-{min(a + spec.of, I) - 1}) holds "
            f"{int(count[row, group])} nonzero weights, {spec.name} allows {spec.keep}. Prune first, or use 'bitmap'"
        )
    W = W.view(R, -1, per * 2)
    # Nonzero weights claim slots first, then -0.0 (so that it survives where there is room), then +0.0.
    rank = torch.where(W != 0, 0, torch.where(torch.signbit(W), 1, 2))
    order = rank * (per * 2) + torch.arange(per * 2, device=W.device)
    index = order.argsort(-1)[..., :per].sort(-1).values
    return W.gather(-1, index).view(R, -1), index.view(R, -1)


def _bitmap(W_OI: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every weight whose bits are not all zero is stored: -0.0 takes a slot, so prune with +0.0."""
    bits = W_OI.view(torch.int32 if W_OI.dtype == torch.float32 else torch.int16)
    counts = (bits != 0).sum(1)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return {
        "values": torch.cat([W_OI[a:b][bits[a:b] != 0] for a, b in row_blocks(*W_OI.shape)]),
        "mask": torch.cat([pack_fields(bits[a:b] != 0, 1) for a, b in row_blocks(*W_OI.shape)]),
        "offsets": offsets.to(torch.int32 if int(offsets[-1]) < 1 << 31 else torch.int64),
    }


# -- integers -------------------------------------------------------------------------------------------------------------


def _codes(W_OI, spec: Format, scale_OG, zero_OG, group: int) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {}
    for a, b in row_blocks(*W_OI.shape):
        W, size, index = W_OI[a:b], group, None
        if spec.keep:
            W, index = _nm_rows(W, spec, a)
            size = group // 2
            parts.setdefault("index", []).append(pack_fields(index, 2))
        zero = None if zero_OG is None else zero_OG[a:b]
        codes = _grid_codes(W, spec, scale_OG[a:b], zero, size, a, index, W_OI.shape[1])
        for name, words in write_codes(codes, spec.bits).items():
            parts.setdefault(name, []).append(words)
    return {k: torch.cat(v) for k, v in parts.items()}


def write_codes(codes_RC: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Word tensors of integer codes [R, C], rows padded to whole words (int3: of the high plane, 32 columns)."""
    if bits != 3:
        return {"codes": pack_fields(codes_RC, bits)}
    low, high = pack_fields(codes_RC & 3, 2), pack_fields(codes_RC >> 2, 1)
    return {"low": F.pad(low, (0, 2 * high.shape[1] - low.shape[1])), "high": high}


def read_codes(t: dict[str, torch.Tensor], bits: int, columns: int) -> torch.Tensor:
    """Codes [R, columns] of the word tensors of an integer format, int32."""
    if bits == 3:
        return unpack_fields(t["low"], 2, columns) | unpack_fields(t["high"], 1, columns) << 2
    return unpack_fields(t["codes"], bits, columns)


def _grid_codes(W, spec: Format, scale, zero, group: int, first_row: int, index, columns: int) -> torch.Tensor:
    """Codes whose value is exactly W. ``index`` [R, kept] places the kept weights of a 2:4 row in the messages."""
    top = (1 << spec.bits) - 1
    s = _spread(scale, group, W.shape[1]).double()
    z = float(1 << (spec.bits - 1)) if zero is None else _spread(zero, group, W.shape[1]).double()
    nearest = torch.where(s == 0, z, W.double() / s + z).round().nan_to_num(0.0)
    codes = nearest.clamp(0, top)
    found = torch.zeros(W.shape, dtype=torch.bool, device=W.device)
    # An 8-bit product rounded to bfloat16 can lie half a step from its code: the neighbours are tried as well.
    for step in (0, 1, -1):
        trial = (nearest + step).clamp(0, top)
        hit = dequantize(trial, scale, zero, spec.bits, group, W.dtype) == W
        codes = torch.where(hit & ~found, trial, codes)
        found |= hit
    if index is not None:
        real = torch.arange(W.shape[1], device=W.device) // 2 * 4 + index < columns
        found |= ~real
    if not found.all():
        row, j = (int(i) for i in (~found).nonzero()[0])
        column = j if index is None else j // 2 * 4 + int(index[row, j])
        near = dequantize(codes, scale, zero, spec.bits, group, W.dtype)[row, j]
        raise ValueError(
            f"row {first_row + row}, group {j // group} (column {column}): {float(W[row, j]):.9g} is off the grid of "
            f"{spec.name}, nearest is {float(near):.9g}. pack stores weights that are (code - zero) * scale; quantise first"
        )
    return codes.long()


def _spread(per_group_RG: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """[R, G] -> [R, columns], the last group going on over padding."""
    wide = per_group_RG.repeat_interleave(group, 1)[:, :columns]
    return F.pad(wide, (0, columns - wide.shape[1]), mode="replicate") if wide.shape[1] < columns else wide


# -- arguments ------------------------------------------------------------------------------------------------------------


def _spec(format: str) -> Format:
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; formats are {', '.join(FORMATS)}")
    return FORMATS[format]


def _group_size(group_size: int | None, spec: Format, columns: int) -> int:
    group = columns if group_size is None else group_size
    if not isinstance(group, int) or group < 1 or (spec.keep and (group % 4 or columns % 4)):
        need = "a positive multiple of 4, as must be the columns," if spec.keep else "a positive integer"
        raise ValueError(f"{spec.name} needs a group_size that is {need} or None; got {group_size!r} for {columns} columns")
    return min(group, columns)


def _scales(scale, zero, rows: int, groups: int, W: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    if scale is None:
        raise ValueError(f"{format} needs scale [{rows}, {groups}] (and zero, if the grid is not symmetric)")
    out = []
    for name, value in (("scale", scale), ("zero", zero)):
        if value is None:
            out.append(None)
            continue
        value = value.detach()
        if value.numel() != rows * groups or value.shape[0] != rows:
            raise ValueError(f"{name} must be [{rows}, {groups}] (rows, groups), got {tuple(value.shape)}")
        value = value.reshape(rows, groups)
        if value.device != W.device:
            raise ValueError(f"{name} is on {value.device}, the weight on {W.device}")
        if not torch.isfinite(value).all():
            row, group = (int(i) for i in (~torch.isfinite(value)).nonzero()[0])
            raise ValueError(f"{name} of row {row}, group {group} is {float(value[row, group])}")
        out.append(value)
    scale, zero = out
    if scale.dtype not in FLOATS:
        raise ValueError(f"scale must be one of {', '.join(map(str, FLOATS))}; got {scale.dtype}")
    if zero is not None:  # uint8 promises the kernels a range in which 16-bit arithmetic is exact
        whole = bool(((zero == zero.round()) & (zero >= 0) & (zero <= min(255, 1 << FORMATS[format].bits))).all())
        zero = zero.to(torch.uint8 if whole else scale.dtype).contiguous()
    return scale.contiguous(), zero
