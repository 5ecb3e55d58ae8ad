"""Other orders of the same stored bytes, for kernels that want them: ``arrange`` and ``restore``.

``fragments`` (2:4, int3, int4, int8, 2:4+int4; 16-bit weights): what one lane of a warp feeds to one tensor-core
instruction lies together, so that a warp reads 512 contiguous bytes and no value moves between lanes. Rows are padded to 32
(two 16-row tiles). With lane = 4 g + t, the 16 x 16 operand A of ``mma.m16n8k16`` (and the kept half of ``mma.sp.m16n8k32``)
holds in register r = 2 c + h, half b the row 8 h + g and the column 8 c + 2 t + b (PTX ISA 9.7.14, "Matrix fragments").
Dimensions below: o block of 32 rows, y tile of it, k step along columns, i p s c b parts of a column, h g of a row.

``slices`` (bitmap): rows in blocks of 32, lane = row; each row is cut into chunks of up to eight nonzeros that lie within 64
columns of a base, 6 bits a column beside 14 bits of base: 24 bits a nonzero, padded to the longest row of the block. A
matrix-vector product over it needs no rank computation, which is what makes an expanded bitmap slower than dense.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from . import cusparselt
from .formats import FORMATS, Packed, pack, pack_fields, read_codes, row_blocks, unpack, unpack_fields, write_codes

ROWS = 32  # rows of a block in both layouts
CHUNK, WINDOW = 8, 64  # nonzeros of a chunk, and the columns they may span
#: Columns that one step of a fragment kernel covers; integer groups must not end inside a step.
STEP = {"2:4": 32, "int8": 32, "int4": 64, "int3": 64, "2:4+int4": 128}


def arrange(packed: Packed, layout: str) -> Packed:
    """The same weight in another layout: ``rows``, ``fragments``, ``slices`` or ``library`` (cuSPARSELt's, on a GPU).

    Raises:
        ValueError: the format has no such layout, or this weight cannot take it (dtype, group size, zero points), saying why.
    """
    if packed.layout == layout:
        return packed
    if packed.layout != "rows":
        return arrange(restore(packed), layout)
    if reason := cannot(packed, layout):
        raise ValueError(reason)
    if layout == "library":
        tensors = cusparselt.compress(unpack(packed))
    else:
        tensors = _slices(packed) if layout == "slices" else _fragments(packed)
    return dataclasses.replace(packed, layout=layout, tensors=tensors)


def cannot(packed: Packed, layout: str) -> str | None:
    """Why this weight cannot take ``layout``, or None if it can."""
    if layout == "rows":
        return None
    if layout == "library":
        return cusparselt.cannot(packed)
    if layout == "slices":
        if packed.format != "bitmap":
            return f"layout 'slices' belongs to bitmap, not to {packed.format}"
        return (
            None
            if packed.shape[1] <= 1 << 16
            else f"layout 'slices' holds up to 65536 columns, the weight has {packed.shape[1]}"
        )
    if layout != "fragments" or packed.format not in STEP:
        return f"{packed.format} has no layout {layout!r}; layouts are rows, fragments ({', '.join(STEP)}) and slices (bitmap)"
    if packed.dtype not in (torch.float16, torch.bfloat16):
        return f"layout 'fragments' needs float16 or bfloat16 weights, got {packed.dtype}"
    step, group = STEP[packed.format], packed.group_size
    if group is not None and group % step and group < packed.shape[1]:
        return f"layout 'fragments' of {packed.format} needs a group_size that is a multiple of {step}, got {group}"
    zero = packed.tensors.get("zero")
    if zero is not None and zero.dtype != torch.uint8:
        return f"layout 'fragments' of {packed.format} needs whole zero points from 0 to 2^bits: 16-bit arithmetic is exact on those"
    return None


def restore(packed: Packed) -> Packed:
    """Any layout back to ``rows``, bit for bit."""
    if packed.layout == "rows":
        return packed
    if packed.layout == "slices":
        return pack(unpack(packed), packed.format)
    if packed.layout == "library":
        return pack(cusparselt.decompress(packed), packed.format)
    return dataclasses.replace(packed, layout="rows", tensors=_from_fragments(packed))


# -- fragments ------------------------------------------------------------------------------------------------------------
# A spec names the dimensions of the row-major tensor and, in the order they are stored, of the fragment tensor.

_SIZES = {"y": 2, "h": 2, "g": 8, "t": 4, "b": 2, "c": 2, "s": 2}
_VALUES = ("oyhgkctb", "okygtchb", {})  # kept weights of 2:4, 16 a step
_META = (
    "oyhgkc",
    "okgych",
    {},
)  # 16-bit halves of index words: lane t = 2 y + c holds row g, then row g + 8
_META4 = ("oyhgkic", "okgycih", {"i": 4})  # four steps of one lane side by side
_INT = {
    "int4": ("oyhgkptscb", "okygtpsbch", {"p": 2}),
    "int8": ("oyhgkptscb", "okygtpschb", {"p": 1}),
    "2:4+int4": ("oyhgkictb", "okygtibch", {"i": 4}),
}
_INT3 = ("oyhgkptscb", "okgtybpsch", {"p": 2})


def _order(t: torch.Tensor, spec: tuple[str, str, dict[str, int]], rows: int, *, back: bool = False) -> torch.Tensor:
    """Row-major [rows, columns] -> fragment order (flat), or ``back``."""
    source, target, extra = spec
    sizes = {**_SIZES, **extra, "o": rows // ROWS}
    sizes["k"] = t.numel() // math.prod(sizes[d] for d in source if d != "k")
    a, b = (target, source) if back else (source, target)
    moved = t.reshape([sizes[d] for d in a]).permute([a.index(d) for d in b]).contiguous()
    return moved.view(rows, -1) if back else moved.view(-1)


def _fragments(packed: Packed) -> dict[str, torch.Tensor]:
    (O, I), t, spec = packed.shape, packed.tensors, FORMATS[packed.format]
    rows, columns = -(-O // ROWS) * ROWS, -(-I // STEP[packed.format]) * STEP[packed.format]
    out = {}
    if spec.keep:
        # 0x4 keeps positions 0 and 1: padding must be a pattern the instruction accepts.
        index = F.pad(t["index"], (0, columns // 32 - t["index"].shape[1], 0, rows - O), value=0x44444444)
        out["index"] = _order(index.view(torch.int16), _META4 if spec.bits else _META, rows).view(torch.int32)
    if not spec.bits:
        return {"values": _order(F.pad(t["values"], (0, 0, 0, rows - O)), _VALUES, rows), **out}
    width = columns // 2 if spec.keep else columns
    blocks = [
        _code_words({k: v[a:b] for k, v in t.items()}, spec.name, spec.bits, width, min(I, width) if not spec.keep else None)
        for a, b in row_blocks(O, I)
    ]
    out |= {k: torch.cat([block[k] for block in blocks]) for k in blocks[0]}
    for name in ("scale", "zero"):
        if name in t:  # [G, O] with the four rows of a lane (two tiles, rows g and g + 8) side by side
            out[name] = F.pad(t[name], (0, 0, 0, rows - O)).T.reshape(-1, 2, 2, 8).permute(0, 3, 1, 2).reshape(-1, rows)
    return out


def _code_words(t: dict[str, torch.Tensor], format: str, bits: int, width: int, columns: int | None) -> dict[str, torch.Tensor]:
    """Fragment-ordered words of a block of rows: ``columns`` real codes a row (None: all stored), padded to ``width``."""
    stored = t["low"].shape[1] * 16 if bits == 3 else t["codes"].shape[1] * (32 // bits)
    codes = read_codes(t, bits, stored if columns is None else columns)
    codes = F.pad(codes, (0, width - codes.shape[1], 0, -codes.shape[0] % ROWS))
    rows = codes.shape[0]
    if bits == 3:
        return {"codes": _three_words(_order(codes, _INT3, rows))}
    return {"codes": pack_fields(_order(codes, _INT[format], rows)[None], bits)[0]}


def _three_words(codes: torch.Tensor) -> torch.Tensor:
    """3-bit codes, 16 for each half of a lane's registers and tile, in three words a tile with no bit to spare.

    Half b (16 bits) of word w holds codes 5 w to 5 w + 4, the first in the lowest bits, and on top bit w of code 15. In memory:
    word, lane, tile, so that a lane reads one word of both tiles in 8 bytes.
    """
    c = codes.view(-1, 32, 2, 2, 16)  # block and step, lane, tile, half, code
    five = (c[..., :15].unflatten(-1, (3, 5)) << torch.arange(0, 15, 3, device=c.device)).sum(-1)
    top = (c[..., 15:] >> torch.arange(3, device=c.device) & 1) << 15
    halves = (five | top).permute(0, 4, 1, 2, 3)
    return pack_fields(halves.reshape(1, -1), 16)[0]


def _from_three_words(words: torch.Tensor) -> torch.Tensor:
    halves = unpack_fields(words.reshape(1, -1), 16, 2 * words.numel()).view(-1, 3, 32, 2, 2).permute(0, 2, 3, 4, 1)
    five = halves[..., None] >> torch.arange(0, 15, 3, device=words.device) & 7
    last = (halves >> 15 << torch.arange(3, device=words.device)).sum(-1, keepdim=True)
    return torch.cat([five.flatten(-2), last], -1).int().view(-1)


def _from_fragments(packed: Packed) -> dict[str, torch.Tensor]:
    (O, I), t, spec = packed.shape, packed.tensors, FORMATS[packed.format]
    rows = -(-O // ROWS) * ROWS
    out, words = {}, -(-I // 32)
    if spec.keep:
        index = _order(t["index"].view(torch.int16), _META4 if spec.bits else _META, rows, back=True)
        out["index"] = index.contiguous().view(torch.int32)[:O, :words].contiguous()
    if not spec.bits:
        return {"values": _order(t["values"], _VALUES, rows, back=True)[:O, : words * 16].contiguous(), **out}

    blocks = []
    flat = t["codes"].view(rows // ROWS, -1)
    step = max(1, (1 << 22) // (flat.shape[1] * 32 // spec.bits))  # unpacked, a code takes 4 bytes
    for block in flat.split(step):
        if spec.bits == 3:
            fields, order = _from_three_words(block), _INT3
        else:
            fields = unpack_fields(block.reshape(1, -1), spec.bits, block.numel() * 32 // spec.bits)[0]
            order = _INT[spec.name]
        real = _order(fields, order, block.shape[0] * ROWS, back=True)[:, : words * 16 if spec.keep else I]
        blocks.append(write_codes(real, spec.bits))
    out |= {k: torch.cat([block[k] for block in blocks])[:O] for k in blocks[0]}
    for name in ("scale", "zero"):
        if name in t:
            out[name] = t[name].reshape(-1, 8, 2, 2).permute(0, 2, 3, 1).reshape(-1, rows).T[:O].contiguous()
    return out


# -- slices ---------------------------------------------------------------------------------------------------------------


def _slices(packed: Packed) -> dict[str, torch.Tensor]:
    O, I = packed.shape
    values, words, counts = [], [], [0]
    for a in range(0, O, ROWS):
        v, w = _slice(packed, a, min(a + ROWS, O), I)
        values.append(v)
        words.append(w)
        counts.append(v.shape[0])
    offsets = torch.tensor(counts, dtype=torch.int64).cumsum(0)
    if int(offsets[-1]) * ROWS * CHUNK >= 1 << 31:
        raise ValueError(f"layout 'slices' addresses 2^31 slots, a weight of shape {packed.shape} needs more; use rows")
    return {"values": torch.cat(values), "words": torch.cat(words), "offsets": offsets.to(torch.int32).to(packed.device)}


def _slice(packed: Packed, start: int, stop: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One block of rows: values [chunks, 32, 8] and words [chunks, 32, 2] (offsets 0-4; offsets 5-7 and base / 4)."""
    t, device, dtype = packed.tensors, packed.device, packed.dtype
    mask = F.pad(unpack_fields(t["mask"][start:stop], 1, columns), (0, 0, 0, ROWS - (stop - start))).bool()
    a, b = int(t["offsets"][start]), int(t["offsets"][stop])
    count = mask.sum(1)
    longest = int(count.max()) + CHUNK
    far = 1 << 20  # behind the last column, so never inside a window
    slot = torch.arange(longest, device=device)
    inside = slot < count[:, None]
    column = torch.full((ROWS, longest), far, device=device)
    column[inside] = mask.nonzero()[:, 1]
    value = torch.zeros((ROWS, longest), dtype=dtype, device=device)
    value[inside] = t["values"][a:b]
    at = torch.zeros(ROWS, dtype=torch.int64, device=device)
    values, words = [], []
    shifts = torch.tensor([0, 6, 12, 18, 24, 0, 6, 12], device=device)
    while (at < count).any():
        pick = (at[:, None] + torch.arange(CHUNK, device=device)).clamp(max=longest - 1)
        c, v = column.gather(1, pick), value.gather(1, pick)
        base = torch.where(c[:, :1] == far, 0, c[:, :1] // 4 * 4)
        near = c - base < WINDOW
        fields = torch.where(near, c - base, 0) << shifts
        pair = torch.stack([fields[:, :5].sum(1), fields[:, 5:].sum(1) + (base[:, 0] // 4 << 18)], 1)
        words.append(torch.where(pair >= 1 << 31, pair - (1 << 32), pair).int())
        values.append(torch.where(near, v, torch.zeros((), dtype=dtype, device=device)))
        at = at + near.sum(1)
    if not values:
        return value.new_zeros((0, ROWS, CHUNK)), torch.zeros((0, ROWS, 2), dtype=torch.int32, device=device)
    return torch.stack(values), torch.stack(words)


def slice_rows(packed: Packed, start: int, stop: int) -> torch.Tensor:
    """Dense rows of a weight in layout ``slices``; ``start`` is a multiple of 32."""
    t, (O, I) = packed.tensors, packed.shape
    blocks = []
    for block in range(start // ROWS, -(-stop // ROWS)):
        a, b = int(t["offsets"][block]), int(t["offsets"][block + 1])
        column, value = slice_columns(t["words"][a:b]), t["values"][a:b]
        real = (
            value.view(torch.int32 if value.dtype == torch.float32 else torch.int16) != 0
        )  # every stored weight has a bit set
        W = torch.zeros((ROWS, I), dtype=packed.dtype, device=packed.device)
        row = torch.arange(ROWS, device=packed.device)[None, :, None].expand_as(column)
        W[row[real], column[real]] = value[real]
        blocks.append(W)
    return torch.cat(blocks)[: min(stop, O) - start]


def slice_columns(words: torch.Tensor) -> torch.Tensor:
    """Words [chunks, 32, 2] -> columns [chunks, 32, 8]."""
    shifts = torch.tensor([0, 6, 12, 18, 24], dtype=torch.int32, device=words.device)
    offsets = torch.cat([words[..., :1] >> shifts, words[..., 1:] >> shifts[:3]], -1) & 63
    return (offsets + (((words[..., 1:] >> 18) & 0x3FFF) << 2)).long()
