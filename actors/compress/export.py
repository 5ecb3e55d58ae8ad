"""A compressed model as a checkpoint that others load: transformers, vLLM, and whatever reads safetensors.

| format | holds | read by |
|---|---|---|
| compressed-tensors | integer codes, packed (``pack-quantized``); W8A8 (``int-quantized``) | transformers, vLLM (4 and 8 bits) |
| gptq | integer codes in GPTQ's layout, also with act-order | transformers with gptqmodel; vLLM if symmetric and in order |
| awq | 4-bit codes in AWQ's GEMM layout | vLLM; transformers with gptqmodel |
| bitsandbytes | LLM.int8, NF4, FP4 as bitsandbytes stores them | transformers |
| dense | ordinary weights, zeros where they were pruned; our packed form in a folder | everything |
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import BadInput
from ..models import rename
from .artifacts import separate
from .base import Compressed, StoredLinear
from .bitsandbytes_ import state_dict
from .experts import checkpoint_leaves, mixtures, split_experts
from .structure import decoder_blocks, named_linears, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...kernels.formats import Packed
    from ..cell import Cell

FORMATS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "dense")
#: Our packed form in an exported folder. One level down: vLLM takes every ``*.safetensors`` beside the weights for weights.
PACKED = "packed/packed.safetensors"
_BITSANDBYTES = ("int8", "nf4", "fp4")
#: Architectures of which transformers 5.23, making the model, asks every linear for a weight, and packed ones have none.
_ASKS_FOR_WEIGHTS = ("falcon", "gpt_bigcode", "nanochat")
#: Order in which AWQ's GEMM layout puts eight codes into a word.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Exported(NamedTuple):
    path: Path
    format: str
    size_bytes: int  # of the weights as written
    notes: list[str]  # what a user of the checkpoint should know

    def __str__(self) -> str:
        return "\n".join([f"{self.path}: {self.format}, {self.size_bytes / 1e6:.0f} MB", *self.notes])


def check_output(out_dir: Path | str) -> Path:
    """BadInput if there is something in ``out_dir``, or it cannot be made; ask before the long work."""
    out = Path(out_dir)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BadInput(f"{out} exists and is not an empty directory", where="-o", fix="Give a new directory")
        with tempfile.TemporaryDirectory(dir=next(p for p in out.absolute().parents if p.exists())):
            pass
    except OSError as error:
        raise BadInput(f"cannot write {out}: {error.strerror}", where="-o", fix="Give a directory that can be made") from error
    return out


def check_format(format: str, method: str, params: Mapping[str, Any], model_config: Any, backend: str = "comptrust") -> None:
    """BadInput for an unknown format, or one that cannot hold what ``method`` makes of a model; ask before the long work.

    ``model_config``: the model's transformers config. Reads no weights.
    """
    if format not in (*FORMATS, "auto"):
        raise BadInput(f"unknown format {format!r}", where="--format", fix=f"One of: auto, {', '.join(FORMATS)}")
    made, why = _foreseen(method, params, model_config, backend), {}
    for name, fit in _FITS.items():
        try:
            fit(made, [])
        except BadInput as error:
            why[name] = error.problem
    if (chosen := _choose(made, []) if format == "auto" else format) in why:
        others = [f for f in FORMATS if f not in why]
        fix = f"One of: auto, {', '.join(others)}" if others else "Take another method"
        raise BadInput(f"{chosen} cannot hold this cell of {method}: {why[chosen]}", where="--format", fix=fix)


def _foreseen(method: str, params: Mapping[str, Any], model_config: Any, backend: str) -> Compressed:
    """What ``method`` will make of a model, with shapes alone."""
    from transformers import AutoModelForCausalLM

    from . import METHODS, backends

    spec = METHODS[method]
    schema = backends.BACKENDS[backend][method] if backend in backends.BACKENDS else spec.config
    with torch.device("meta"):
        model = split_experts(AutoModelForCausalLM.from_config(model_config))
        some = torch.empty(0)
    prefix, blocks = decoder_blocks(model)
    linears = named_linears(prefix, blocks) if method != "dense" else {}
    stored = {}
    for name, c in schema.model_validate(dict(params)).compressed(linears).items():
        shape, bits = (linears[name].out_features, linears[name].in_features), getattr(c, "bits", None)
        group, codes = getattr(c, "group_size", None), bits is not None and spec.backend != "bitsandbytes"
        stored[name] = StoredLinear(
            name, shape, bits or 16, codes=some if codes else None, scale=some if codes else None,
            zero=some if codes and not getattr(c, "symmetric", True) else None, group_size=group if codes else None,
            group_index=some if codes and group and getattr(c, "order", None) == "act" else None,
            pattern=getattr(c, "pattern", None),
            format={"llm_int8": "int8", "nf4": "nf4", "fp4": "fp4"}.get(method, spec.format if codes else "pruned"),
        )  # fmt: skip
    return Compressed(model, stored=stored)


def export(
    compressed: Compressed,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: Path | str,
    *,
    format: str = "auto",
    cell: Cell | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Exported:
    """Write ``out_dir``: weights, configuration, tokenizer, model card; complete or not there at all.

    ``auto`` chooses compressed-tensors for integer codes, gptq where act-order needs a group index for each input (dense if that
    layout cannot hold the model), bitsandbytes for its own, else dense. ``cell`` and ``measured`` (its row of ``results``) go on
    the card. Reloaded by transformers in the dtype of the model here, the logits are the same up to the order of sums, but in
    bfloat16: there readers round the scale, and then its product with the code, where we round that product alone.

    Raises BadInput for an unknown format, one that cannot hold these weights, a dense cell of a model that is quantised already,
    or an ``out_dir`` with something in it.
    """
    out = check_output(out_dir)
    if format not in (*FORMATS, "auto"):
        raise BadInput(f"unknown format {format!r}", where="--format", fix=f"One of: auto, {', '.join(FORMATS)}")
    before = compressed.model.config.to_dict().get("quantization_config")
    if before and not before.get("dequantize"):
        raise BadInput(
            f"the model was quantised before ({before.get('quant_method', 'in a format without a name')})",
            where="model",
            fix="Copy its own checkpoint: that is what was measured",
        )
    notes: list[str] = []
    asked, format = format, _choose(compressed, notes) if format == "auto" else format
    try:
        tensors, quantization = _WRITERS[format](compressed, notes)
    except BadInput as error:
        if asked != "auto":
            raise
        raise BadInput(error.problem, where=error.where, fix="Take another method") from error
    if text_config(compressed.model) is not compressed.model.config:
        notes.append(
            "This model reads more than text, and the processor of that is not here: copy the original's preprocessor_config.json "
            "and processor_config.json beside the weights."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        _save(compressed.model, tensors, quantization, temporary)
        if packed := pack_pruned(compressed):
            (temporary / PACKED).parent.mkdir()
            save_packed(packed, temporary / PACKED)
            notes.append(
                f"{PACKED} holds the pruned layers in comptrust's packed form; "
                "read it with comptrust.actors.compress.export.load_packed."
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
            _without_code(temporary / "tokenizer_config.json")
        (temporary / "README.md").write_text(card(compressed, format, notes, cell, measured), encoding="utf-8")
        temporary.chmod(0o755)
        for file in (f for f in temporary.rglob("*") if f.is_file()):
            file.chmod(0o644)  # the writer of safetensors leaves them to their owner alone
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    size = sum(p.stat().st_size for p in out.glob("model*.safetensors"))
    return Exported(out, format, size, notes)


def _choose(compressed: Compressed, notes: list[str]) -> str:
    layers = compressed.stored.values()
    if any(s.format in _BITSANDBYTES for s in layers):
        return "bitsandbytes"
    if _act_order(compressed.stored):
        try:
            _fit_gptq(compressed, [])
        except BadInput as error:
            notes.append(f"Only GPTQ's layout has act-order, and it cannot hold this model: {error.problem}.")
            return "dense"
        return "gptq"
    try:
        _fit_compressed_tensors(compressed, [])
    except BadInput:
        return "dense"
    return "compressed-tensors"


def _integer(s: StoredLinear) -> bool:
    """Weights are the codes and nothing else (an input scale that could not be folded away needs a float weight)."""
    return s.codes is not None and s.input_scale is None and s.format in ("int", "w8a8")


def _act_order(layers: Mapping[str, StoredLinear]) -> bool:
    return any(s.codes is not None and s.group_index is not None for s in layers.values())


# --- what a format can hold: the layers that it takes, BadInput where it cannot hold the model -------------------------------


def _fit_dense(compressed: Compressed, notes: list[str]) -> dict[str, StoredLinear]:
    if any(s.format in (*_BITSANDBYTES, "w8a8") for s in compressed.stored.values()):
        raise BadInput(
            "these layers compute with quantised inputs, which dense weights cannot hold", where="--format", fix="Use auto"
        )
    return {}


def _fit_compressed_tensors(compressed: Compressed, notes: list[str]) -> dict[str, StoredLinear]:
    layers = _codes(compressed, "compressed-tensors", notes)
    if why := _unreadable_mixture(compressed, layers):
        raise BadInput(f"of a mixture of experts, transformers {why}", where="--format", fix="Use dense")
    if _act_order(layers):
        raise BadInput(
            "compressed-tensors has no act-order with a group index any more", where="--format", fix="Use format gptq"
        )
    if _dense_on_load(compressed, layers) and len({(s.bits, s.group_size, s.symmetric) for s in layers.values()}) > 1:
        raise BadInput(
            "transformers cannot load these layers in several widths or groupings", where="--format", fix="Use dense"
        )
    for name, s in layers.items():
        if not s.symmetric and s.bits == 4 and s.shape[0] <= 8 and (s.group_size or s.shape[1]) < s.shape[1]:
            raise BadInput(
                f"compressed-tensors 0.20 cannot read 4-bit zero points of 8 outputs or fewer in groups ({name} has {s.shape[0]})",
                where="--format", fix="Use dense",
            )  # fmt: skip
    return layers


def _unreadable_mixture(compressed: Compressed, layers: Mapping[str, StoredLinear]) -> str | None:
    """What transformers 5.23, which makes one dense tensor of all experts as it loads, cannot do with ``layers`` of a mixture."""
    found = mixtures(compressed.model)
    inside = [
        f"{name}.{linear}" for name, m in found.items() for linear, module in m.named_modules() if isinstance(module, nn.Linear)
    ]
    if not found:
        return None
    if not checkpoint_leaves(compressed.model):
        return "has checkpoints with all experts in one tensor"
    if any(s.format == "w8a8" or not s.symmetric for s in layers.values()):
        return "reads no zero points and no quantised inputs"
    if len({(s.bits, s.group_size) for s in layers.values()}) > 1:
        return "reads one width and group size"
    return next((f"reads experts only if all are compressed, and {name} is not" for name in inside if name not in layers), None)


def _dense_on_load(compressed: Compressed, layers: Mapping[str, StoredLinear]) -> bool:
    """Whether transformers must dequantise on load, which knows one scheme a model: compressed-tensors 0.20 lays out no packed zero
    points for it to load into, and some architectures ask packed layers for a weight."""
    return any(not s.symmetric for s in layers.values()) or compressed.model.config.model_type in _ASKS_FOR_WEIGHTS


def _no_mixture(compressed: Compressed, format: str) -> None:
    if mixtures(compressed.model):
        raise BadInput(f"transformers reads no mixture of experts from {format}", where="--format", fix="Use auto")


def _fit_gptq(compressed: Compressed, notes: list[str]) -> dict[str, StoredLinear]:
    _no_mixture(compressed, "GPTQ's layout")
    layers = _codes(compressed, "gptq", notes)
    head = compressed.model.get_output_embeddings()
    if others := [n for n in _others(compressed.model, layers) if compressed.model.get_submodule(n) is not head]:
        raise BadInput(f"GPTQ's layout has no place for dense layers ({others[0]})", where="--format", fix="Use auto")
    bits, _, _ = _uniform(layers, "gptq")
    step = 32 if bits == 3 else 32 // bits  # codes that fill whole words
    for name, s in layers.items():
        if any(size % step for size in s.shape):
            size = " x ".join(map(str, s.shape))
            raise BadInput(f"{name} is {size}, GPTQ's layout packs {step} codes at a time", where="--format", fix="Use auto")
    return layers


def _fit_awq(compressed: Compressed, notes: list[str]) -> dict[str, StoredLinear]:
    _no_mixture(compressed, "AWQ's layout")
    layers = _codes(compressed, "awq", notes)
    bits, _, _ = _uniform(layers, "awq")
    if bits != 4 or _act_order(layers):
        raise BadInput("AWQ's layout holds 4-bit codes without act-order only", where="--format", fix="Use auto")
    for name, s in layers.items():
        if s.shape[0] % 8:
            raise BadInput(f"{name} has {s.shape[0]} outputs, AWQ's layout packs 8 a word", where="--format", fix="Use auto")
    return layers


def _fit_bitsandbytes(compressed: Compressed, notes: list[str]) -> dict[str, StoredLinear]:
    _no_mixture(compressed, "bitsandbytes' format")
    layers = {n: s for n, s in compressed.stored.items() if s.format in _BITSANDBYTES}
    if not layers:
        raise BadInput("no layer was made by bitsandbytes", where="--format", fix="Use auto")
    if compressed.model.config.model_type == "falcon":
        raise BadInput(
            "transformers puts bitsandbytes' layers in the place of torch's alone, and Falcon has its own", where="--format",
            fix="Take another method",
        )  # fmt: skip
    return layers


_FITS = {
    "compressed-tensors": _fit_compressed_tensors,
    "gptq": _fit_gptq,
    "awq": _fit_awq,
    "bitsandbytes": _fit_bitsandbytes,
    "dense": _fit_dense,
}


# --- one writer a format: (tensors, quantization_config) ---------------------------------------------------------------------

_Written = tuple[dict[str, Tensor], dict[str, Any] | None]


def _dense(compressed: Compressed, notes: list[str]) -> _Written:
    _fit_dense(compressed, notes)
    if any(s.codes is not None for s in compressed.stored.values()):
        notes.append("Weights lie on an integer grid but are stored in full precision.")
    if any(s.pattern for s in compressed.stored.values()):
        notes.append(
            "Pruned weights are stored as zeros: neither compressed-tensors nor vLLM has a sparse format any more, "
            "so size and speed are those of the dense model there."
        )
    return _rest(compressed, set()), None


def _compressed_tensors(compressed: Compressed, notes: list[str]) -> _Written:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    layers = _fit_compressed_tensors(compressed, notes)
    dtype = _dtype(compressed.model)
    tensors = _rest(compressed, set(layers))
    schemes: dict[tuple, list[str]] = {}
    for name, s in layers.items():
        bits, middle = int(s.bits), 2 ** (int(s.bits) - 1)
        tensors[f"{name}.weight_scale"] = _scale(s.scale, dtype)
        schemes.setdefault((bits, s.group_size, s.symmetric), []).append(name)
        if s.format == "w8a8":
            tensors[f"{name}.weight"] = s.codes
            continue
        codes = s.codes if s.symmetric else (s.codes.to(torch.int16) - middle).to(torch.int8)
        tensors[f"{name}.weight_packed"] = pack_to_int32(codes.to(torch.int8), bits)
        tensors[f"{name}.weight_shape"] = torch.tensor(s.shape)
        if s.zero is not None:
            zero = (s.zero.to(torch.int16) - middle).to(torch.int8)
            tensors[f"{name}.weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    if any(bits == 3 for bits, _, _ in schemes):
        notes.append(
            "3-bit codes are packed across words, as compressed-tensors 0.20 does; older versions and vLLM cannot read them."
        )
    w8a8 = all(s.format == "w8a8" for s in layers.values())
    if w8a8:
        notes.append("Inputs are rounded to int8 per token by the reader, whose scale may differ from ours by half a step.")
    if mixtures(compressed.model):
        notes.append("transformers loads the experts as dense weights.")
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True} if w8a8 else None
    format = "int-quantized" if w8a8 else "pack-quantized"
    groups = {}
    for i, ((bits, group, symmetric), names) in enumerate(schemes.items()):
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group" if group else "channel",
                "group_size": group,
                "dynamic": False,
            },
            "input_activations": inputs,
            "output_activations": None,
            "format": format,
        }
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _others(compressed.model, layers),
        "kv_cache_scheme": None,
    }
    if _dense_on_load(compressed, layers):
        config["dequantize"] = True
    return tensors, config


def _gptq(compressed: Compressed, notes: list[str]) -> _Written:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    layers = _fit_gptq(compressed, notes)
    bits, group, symmetric = _uniform(layers, "gptq")
    act_order = _act_order(layers)
    if act_order or not symmetric:
        notes.append(f"vLLM 0.32 does not read GPTQ's layout {'with act-order' if act_order else 'with zero points'}.")
    tensors = _rest(compressed, set(layers))
    # The first version of the layout stores zero - 1, which has no place for 0.
    old = all(s.zero is None or int(s.zero.min()) > 0 for s in layers.values())
    for name, s in layers.items():
        I = s.shape[1]
        codes_IO, zero_GO, scale_GO = _unsigned(s)
        index = s.group_index if s.group_index is not None else torch.arange(I) // (s.group_size or I)
        middle = 2 ** (bits - 1)  # the packer takes signed codes
        tensors[f"{name}.qweight"] = pack_to_int32((codes_IO - middle).to(torch.int8), bits, packed_dim=0)
        tensors[f"{name}.qzeros"] = pack_to_int32((zero_GO - int(old) - middle).to(torch.int8), bits)
        tensors[f"{name}.scales"] = scale_GO
        tensors[f"{name}.g_idx"] = index.to(torch.int32)
    return tensors, {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group or -1,
        "desc_act": act_order,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if old else "gptq_v2",
    }


def _awq(compressed: Compressed, notes: list[str]) -> _Written:
    layers = _fit_awq(compressed, notes)
    _, group, _ = _uniform(layers, "awq")
    tensors = _rest(compressed, set(layers))
    for name, s in layers.items():
        codes_IO, zero_GO, scale_GO = _unsigned(s)
        tensors[f"{name}.qweight"] = _pack_awq(codes_IO)
        tensors[f"{name}.qzeros"] = _pack_awq(zero_GO)
        tensors[f"{name}.scales"] = scale_GO
    return tensors, {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _others(compressed.model, layers),
    }


def _bitsandbytes(compressed: Compressed, notes: list[str]) -> _Written:
    from transformers import BitsAndBytesConfig

    layers = _fit_bitsandbytes(compressed, notes)
    notes.append("vLLM 0.32 does not read checkpoints of bitsandbytes.")
    module: Any = compressed.model.get_submodule(next(iter(layers)))
    skip = _others(compressed.model, layers)
    if next(iter(layers.values())).format == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=module.state.threshold, llm_int8_skip_modules=skip)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=module.weight.quant_type,
            bnb_4bit_use_double_quant=module.weight.compress_statistics,
            bnb_4bit_compute_dtype=module.compute_dtype,
            llm_int8_skip_modules=skip,
        )
    return dict(state_dict(compressed.model)), config.to_dict()


_WRITERS = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "dense": _dense,
}


# --- parts of the writers ----------------------------------------------------------------------------------------------------


def _codes(compressed: Compressed, format: str, notes: list[str]) -> dict[str, StoredLinear]:
    layers = {n: s for n, s in compressed.stored.items() if _integer(s)}
    if format != "compressed-tensors" and any(s.format == "w8a8" for s in layers.values()):
        raise BadInput(
            f"{format} holds weights only, these inputs are quantised too", where="--format", fix="Use compressed-tensors"
        )
    if not layers:
        raise BadInput(f"{format} holds integer codes, and this model has none", where="--format", fix="Use auto or dense")
    if left := [n for n, s in compressed.stored.items() if s.codes is not None and n not in layers]:
        notes.append(
            f"{len(left)} layers ({left[0]}, ...) are stored in full precision: their input is divided by a scale that no "
            f"layer before them can absorb, and the format has no place for it."
        )
    return layers


def _rest(compressed: Compressed, without: set[str]) -> dict[str, Tensor]:
    skip = {f"{name}.weight" for name in without}
    return {n: t for n, t in compressed.model.state_dict().items() if n not in skip}


def _others(model: nn.Module, layers: Mapping[str, StoredLinear]) -> list[str]:
    """Linears that stay as they are."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in layers]


def _uniform(layers: Mapping[str, StoredLinear], format: str) -> tuple[int, int | None, bool]:
    kinds = {(int(s.bits), s.group_size, s.symmetric) for s in layers.values()}
    if len(kinds) > 1:
        raise BadInput(f"{format} has one width and group size for all layers", where="--format", fix="Use auto")
    return kinds.pop()


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Readers dequantise in the dtype of the scale: the model's own, unless that would round the scale."""
    cast = scale.to(dtype)
    return cast if torch.equal(cast.to(scale.dtype), scale) else scale


def _unsigned(s: StoredLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [I, O] and zero points [G, O] from 0 up, int64, and scales [G, O]."""
    middle = 2 ** (int(s.bits) - 1)
    codes = s.codes.long() + (middle if s.symmetric else 0)
    zero = torch.full_like(s.scale, middle, dtype=torch.int64) if s.zero is None else s.zero.long()
    return codes.T, zero.T, s.scale.T.contiguous()


def _pack_awq(codes_RC: Tensor) -> Tensor:
    """[R, C] -> int32 [R, C / 8], eight neighbours along a row in AWQ's order."""
    eight = codes_RC.reshape(codes_RC.shape[0], -1, 8)[..., list(_AWQ_ORDER)]
    return _int32((eight << torch.arange(0, 32, 4, device=eight.device)).sum(-1))


def _int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def _save(model: Any, tensors: Mapping[str, Tensor], quantization: dict[str, Any] | None, folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(_dtype(model)).removeprefix("torch.")
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    config.pop("auto_map", None)  # code beside the original, which was not run and is not here
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")  # save_pretrained refuses what it was read from
    tied = list(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = separate(rename(model, {n: t.detach() for n, t in tensors.items() if n not in tied}, saving=True))
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})


def _without_code(file: Path) -> None:
    """A tokenizer's settings without code of its own, as in the configuration."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.pop("auto_map", None):
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- our packed form ---------------------------------------------------------------------------------------------------------


def pack_pruned(compressed: Compressed) -> dict[str, Packed]:
    """The pruned layers in the packed form that comptrust's kernels run; those without such a form are left out."""
    from ...kernels.formats import format_for, pack

    packed = {}
    for name, s in compressed.stored.items():
        if s.pattern is None or s.input_scale is not None:
            continue
        codes = s.codes is not None and s.group_index is None
        format = format_for(s.pattern, int(s.bits) if codes else None)
        if format is None:
            continue
        weight = compressed.model.get_submodule(name).weight.data
        if "int" in format:
            packed[name] = pack(weight, format, scale=s.scale, zero=s.zero, group_size=s.group_size)
        else:
            packed[name] = pack(weight, format)
    return packed


def save_packed(packed: Mapping[str, Packed], path: Path) -> None:
    """Tensors ``<layer>.<name>``, and in the header how each layer is packed."""
    about = {
        name: {
            "format": p.format,
            "shape": p.shape,
            "dtype": str(p.dtype).removeprefix("torch."),
            "group_size": p.group_size,
            "layout": p.layout,
        }
        for name, p in packed.items()
    }
    tensors = {f"{name}.{part}": t.contiguous().cpu() for name, p in packed.items() for part, t in p.tensors.items()}
    save_file(tensors, path, metadata={"comptrust": json.dumps(about)})


def load_packed(path: Path | str) -> dict[str, Packed]:
    """The layers of a ``packed/packed.safetensors``, by name, on the CPU."""
    from ...kernels.formats import Packed

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["comptrust"])
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in about}
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            name, _, part = key.rpartition(".")
            tensors[name][part] = file.get_tensor(key)
    return {
        name: Packed(a["format"], tuple(a["shape"]), getattr(torch, a["dtype"]), tensors[name], a["group_size"], a["layout"])
        for name, a in about.items()
    }


# --- model card --------------------------------------------------------------------------------------------------------------


def card(compressed: Compressed, format: str, notes: list[str], cell: Cell | None, measured: Mapping[str, Any] | None) -> str:
    """README.md of the checkpoint: what it is, from what, by what, and what was measured."""
    head = ["---", "library_name: transformers", "tags:", "- comptrust", f"- {format}"]
    if cell is not None and re.fullmatch("[0-9a-f]{40}", cell.revision):  # a commit: only models of the hub have one
        head.append(f"base_model: {cell.model.partition('@')[0]}")
    lines = [*head, "---", "", f"# {cell.model if cell else 'Model'}, {cell.label if cell else 'compressed'}", ""]
    facts: dict[str, Any] = {"format": format, "parameters": compressed.parameters}
    if cell is not None:
        facts |= {
            "model": cell.model,
            "revision": cell.revision,
            "method": cell.method,
            "parameters of the method": json.dumps(dict(cell.params), sort_keys=True),
            "backend": cell.backend,
            "dtype": cell.dtype,
            "artifact key": cell.artifact_key,
            "cell key": cell.key if cell.evaluation else "not evaluated",
            "calibration": json.dumps(dict(cell.calibration), sort_keys=True) if cell.calibration else "none",
            "calibration digest": cell.calibration_digest or "none",
            "chat template digest": cell.template or "none",
        }
    facts["size as counted by comptrust (bytes)"] = compressed.size_bytes
    facts["bits per weight" + " of the compressed layers" * bool(compressed.stored)] = round(compressed.bits_per_weight, 3)
    if compressed.sparsity_reached is not None:
        facts["sparsity reached"] = round(compressed.sparsity_reached, 4)
    lines += ["| | |", "|---|---|", *(f"| {k} | {_text(v)} |" for k, v in facts.items()), ""]
    if measured:
        lines += ["## Measured", "", "| column | value |", "|---|---|"]
        lines += [f"| {k} | {_number(v)} |" for k, v in measured.items() if v is not None]
        lines += [
            "",
            "Dimensions run from 0 to 100, higher is better; `worst_drop` is the largest fall against the dense model.",
            "",
        ]
    else:
        lines += ["Trust was not measured for this checkpoint.", ""]
    if notes:
        lines += ["## Notes", "", *(f"- {n}" for n in notes), ""]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    """JSON as code: in plain text the stars of two globs make italics and are gone."""
    return f"`{value}`" if isinstance(value, str) and value.startswith("{") else str(value)
