"""bitsandbytes methods: its own modules, the error its paper's data types have, its own bytes."""

from __future__ import annotations

import math

import pytest
import torch
from comptrust.actors.compress import compress, incompatible
from comptrust.actors.compress.export import export
from comptrust.actors.compress.storing import whole_model
from comptrust.actors.errors import BadInput
from safetensors.torch import load_file
from small_models import make_llama


@pytest.mark.parametrize(
    ("method", "params", "low", "high", "size"),
    [
        ("llm_int8", {}, 0.002, 0.02, lambda rows, weights: weights + 4 * rows),
        # codes, a float32 for each block, a table of 16 values
        ("nf4", {}, 0.05, 0.12, lambda rows, weights: weights / 2 + weights / 64 * 4 + 64),
        ("fp4", {}, 0.08, 0.16, lambda rows, weights: weights / 2 + weights / 64 * 4 + 64),
        # a byte for each block, a float32 for 256 of them and the mean, a second table of 256 values
        ("nf4", {"double_quant": True}, 0.05, 0.12,
         lambda rows, weights: weights / 2 + weights / 64 + 4 * math.ceil(weights / 64 / 256) + 4 + 64 + 1024),
    ],
)  # fmt: skip
def test_modules_errors_and_bytes(llama, tokens, method, params, low, high, size):
    import bitsandbytes as bnb

    done = compress(llama, method, params)
    for name in done.stored:
        module = done.model.get_submodule(name)
        assert isinstance(module, bnb.nn.Linear8bitLt if method == "llm_int8" else bnb.nn.Linear4bit)
    assert all(low < row["error"] < high for row in done.layers)
    for stored in done.stored.values():
        assert stored.size_bytes == size(stored.shape[0], math.prod(stored.shape))
    dense = llama(tokens).logits
    assert (done.model(tokens).logits - dense).norm() < 4 * high * dense.norm()
    assert type(llama.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_reported_error_is_that_of_what_the_module_computes(llama):
    """The weights a module stands for, read off its outputs for unit vectors."""
    done = compress(llama, "nf4", {})
    row = done.layers[0]
    W = llama.get_submodule(row["layer"]).weight
    seen = done.model.get_submodule(row["layer"])(torch.eye(W.shape[1])).T
    assert row["error"] == pytest.approx(float((W - seen).norm() / W.norm()), rel=1e-3)


@pytest.mark.parametrize("method", ["llm_int8", "nf4", "fp4"])
def test_a_layer_of_zeros_has_no_error(method):
    """Models that were made deeper start new blocks so; NaN in the table would spoil every mean over layers."""
    model = make_llama(layers=1)
    model.model.layers[0].mlp.down_proj.weight.zero_()
    errors = {row["layer"].rpartition(".")[2]: row["error"] for row in compress(model, method, {}).layers}
    assert errors.pop("down_proj") == 0 and all(e > 0 for e in errors.values())


def test_inputs_of_four_dimensions_are_refused_and_can_be_skipped():
    """bitsandbytes flattens three, and fails on MLA's latents once the model is loaded and compressed."""
    from transformers import MiniCPM3Config, MiniCPM3ForCausalLM

    config = MiniCPM3Config(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        bos_token_id=1, eos_token_id=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    why = incompatible("llm_int8", {}, config)
    assert why is not None and why.startswith("model.layers.0.self_attn.kv_b_proj has inputs of more than three dimensions")
    assert "layers.1." in str(incompatible("llm_int8", {"skip": ["*.0.self_attn.kv_b_proj"]}, config))
    skip = {"skip": ["*.kv_b_proj"]}
    assert f"(skip: {skip['skip']} leaves it dense)" in why and incompatible("llm_int8", skip, config) is None
    model, ids = MiniCPM3ForCausalLM(config).eval(), torch.arange(20)[None]
    with torch.no_grad():
        with pytest.raises((RuntimeError, ValueError)):  # once bitsandbytes takes them, the refusal can go
            compress(model, "llm_int8").model(ids)
        dense = model(ids).logits
        assert (compress(model, "llm_int8", skip).model(ids).logits - dense).norm() < 0.05 * dense.norm()


def test_other_widths_do_not_exist():
    assert "4 bits, not 3" in incompatible("nf4", {"bits": 3}, None)
    assert "8 bits, not 4" in incompatible("llm_int8", {"bits": 4}, None)


def test_rows_that_split_a_block_are_refused():
    """bitsandbytes 0.50.2 on a CPU gives such weights back wrong (error 0.25 instead of 0.09) and says nothing."""
    model = make_llama(layers=1, intermediate=160)
    assert "160 inputs" in incompatible("nf4", {}, model.config)
    with pytest.raises(BadInput, match="160 inputs"):
        compress(model, "fp4", {})


@pytest.mark.parametrize("params", [{}, {"double_quant": True}])
def test_rows_that_fill_no_tile_of_32_run_on_every_cpu(tokens, params):
    """bitsandbytes 0.50.2 stops with an assertion at the first forward on a CPU with AVX512-BF16."""
    model = make_llama(layers=1, head_dim=20)  # 80 and 40 outputs
    done = compress(model, "nf4", {"skip": ["*.o_proj"]} | params)
    row = next(r for r in done.layers if r["layer"].endswith("q_proj"))
    W = model.get_submodule(row["layer"]).weight
    with torch.inference_mode():
        seen = done.model.get_submodule(row["layer"])(torch.eye(W.shape[1])).T
        assert torch.isfinite(done.model(tokens).logits).all()
    assert row["error"] == pytest.approx(float((W - seen).norm() / W.norm()), rel=1e-3)


@pytest.mark.parametrize("ask", ["export", "bytes of a model that came so"])
def test_scales_of_a_layer_that_ran_stay_in_order(tmp_path, ask):
    """bitsandbytes 0.50 rearranges a layer as it runs on a CPU with AVX512-BF16, and not its scales back as the layer is saved."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as rearrange

    done = compress(make_llama(layers=1), "nf4", {})
    layer = done.model.model.layers[0].mlp.down_proj  # three blocks a row
    codes, scales = layer.weight.data.clone(), layer.weight.quant_state.absmax.bfloat16().float()
    layer.weight.data, _ = rearrange(layer.weight.data, layer.weight.quant_state)
    if ask == "export":
        export(done, None, tmp_path / "out")
        saved = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(saved["model.layers.0.mlp.down_proj.weight.absmax"], scales)
    else:
        whole_model(done.model)
    assert torch.equal(layer.weight.data, codes) and torch.equal(layer.weight.quant_state.absmax, scales)
