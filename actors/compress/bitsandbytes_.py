"""LLM.int8, NF4 and FP4 by bitsandbytes: its modules take the place of the linears and compute as they do in deployment.

Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339; Dettmers et al. 2023, "QLoRA", arXiv:2305.14314 (NF4, FP4, double
quantisation).
"""

from __future__ import annotations

import copy
import logging
import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from .base import MethodConfig, StoredLinear, element_bytes

# A line for each layer and forward, that float32 inputs are rounded to float16; and one that a kernel from the hub is not installed.
for _noisy in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)


class LlmInt8Config(MethodConfig):
    bits: Literal[2, 3, 4, 8] = Field(default=8, description="only 8 exists")
    threshold: float = Field(default=6.0, ge=0, description="input columns with a larger entry stay in 16 bit; 0: none do")

    def of_the_whole_cell(self) -> set[str]:
        return {"threshold"}  # a checkpoint holds one

    def impossible(self) -> str | None:
        return None if self.bits == 8 else f"LLM.int8 has 8 bits, not {self.bits}"


class FourBitConfig(MethodConfig):
    bits: Literal[2, 3, 4, 8] = Field(default=4, description="only 4 exists")
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = Field(
        default=64, description="weights per scale, along the flattened weight"
    )
    double_quant: bool = Field(default=False, description="scales themselves in 8 bit, in blocks of 256 (QLoRA)")

    def impossible(self) -> str | None:
        return None if self.bits == 4 else f"bitsandbytes' NF4 and FP4 have 4 bits, not {self.bits}"

    def misfit(self, name: str, inputs: int) -> str | None:
        # Blocks run along the flattened weight, but bitsandbytes 0.50's CPU kernel reads scales as if each row began a new one:
        # where the block size does not divide a row the weights come back wrong, with no error.
        if inputs % self.block_size:
            why = "bitsandbytes reads wrong scales there"
            return f"block size {self.block_size} does not divide the {inputs} inputs of {name} ({why})"
        return super().misfit(name, inputs)


def int8(linear: nn.Linear, config: LlmInt8Config) -> nn.Module:
    """``bnb.nn.Linear8bitLt`` with the weight of ``linear`` as int8 rows and one float32 scale a row, on its device."""
    import bitsandbytes as bnb

    module = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False,
        threshold=config.threshold, device="meta",
    )  # fmt: skip
    device = linear.weight.device
    module.weight = bnb.nn.Int8Params(linear.weight.data.cpu().clone(), requires_grad=False, has_fp16_weights=False).to(device)
    module.bias = linear.bias
    return module.eval()


def four_bit(linear: nn.Linear, config: FourBitConfig, quant_type: str) -> nn.Module:
    """``bnb.nn.Linear4bit`` with the weight of ``linear`` in 4-bit blocks, computing in the weight's dtype."""
    import bitsandbytes as bnb

    module = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype,
        compress_statistics=config.double_quant, quant_type=quant_type, device="meta",
    )  # fmt: skip
    device = linear.weight.device
    module.weight = bnb.nn.Params4bit(
        linear.weight.data.cpu().clone(), requires_grad=False, blocksize=config.block_size,
        compress_statistics=config.double_quant, quant_type=quant_type, module=module,
    ).to(device)  # fmt: skip
    module.bias = linear.bias
    if (
        linear.out_features % 32
    ):  # bitsandbytes 0.50's layout for CPUs with AVX512-BF16 takes whole tiles of 32 rows, or asserts
        module.support_avx512bf16_for_cpu = False
    return module.eval()


def nf4(linear: nn.Linear, config: FourBitConfig) -> nn.Module:
    return four_bit(linear, config, "nf4")


def fp4(linear: nn.Linear, config: FourBitConfig) -> nn.Module:
    return four_bit(linear, config, "fp4")


def stored(name: str, module: Any, config: MethodConfig) -> StoredLinear:
    """Bytes as bitsandbytes holds them: codes, absmax per block or row, the table of values, the second level of double
    quantisation with its own table."""
    shape = (module.out_features, module.in_features)
    weights = math.prod(shape)
    if isinstance(config, LlmInt8Config):
        return StoredLinear(name, shape, 8, format="int8", size_bytes=weights + 4 * shape[0])
    state = module.weight.quant_state
    size = math.ceil(weights / 2) + element_bytes(state.absmax) + element_bytes(state.code)
    if state.nested:
        size += element_bytes(state.state2.absmax) + element_bytes(state.state2.code) + element_bytes(state.offset)
    return StoredLinear(name, shape, 4, group_size=state.blocksize, format=state.quant_type, size_bytes=size)


def state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """``module.state_dict()``. For a layer that has run on a CPU with AVX512-BF16 bitsandbytes 0.50 alone gives its scales in the order of
    that CPU's layout, and leaves them so in the layer."""
    for layer in module.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False) and not state.original_nested:
            state.absmax = state.absmax.T.reshape(-1).float()
    return module.state_dict()


def weight_error(dense_OI: torch.Tensor, module: Any) -> float:
    """||W - W'||_F / ||W||_F of the weights bitsandbytes stores."""
    import bitsandbytes.functional as F

    if hasattr(module.weight, "SCB") or getattr(module, "state", None) is not None:
        scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        W = module.weight.data.float() * (scale.float().view(-1, 1) / 127)
    else:
        state = copy.copy(module.weight.quant_state)
        W = F.dequantize_4bit(module.weight.data, state).float()
    dense = dense_OI.float()
    return float((dense - W.view(dense.shape)).norm() / dense.norm().clamp_min(1e-30))
