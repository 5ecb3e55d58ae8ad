"""Parameters: defaults, bounds, contradictions, and what a model's shape allows, all before any weights are read."""

from __future__ import annotations

import pytest
import torch
from comptrust.actors.cell import METHODS as CELL_METHODS
from comptrust.actors.cell import canonical
from comptrust.actors.compress import METHODS, check, compress, incompatible, required_tokens
from comptrust.actors.compress.export import export
from comptrust.actors.errors import BadInput
from small_models import make_llama


@pytest.fixture(scope="module")
def config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=300,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
    )


def test_the_same_methods_everywhere():
    assert set(METHODS) == set(CELL_METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_complete_json_and_stable(method):
    params = check(method, {})
    assert set(params) == set(METHODS[method].config.model_fields)
    assert check(method, params) == params and canonical(params)


@pytest.mark.parametrize(
    ("method", "params", "where", "says"),
    [
        ("gptqq", {}, "methods[1].method", "unknown method 'gptqq'.*gptq"),
        ("gptq", {"bits": 5}, "methods[1].bits", "5"),
        ("gptq", {"bit": 4}, "methods[1].bit", "no parameter 'bit'.*bits"),
        ("gptq", {"group_size": 4}, "methods[1].group_size", "4"),
        ("wanda", {"pattern": "4:2"}, "methods[1].pattern", "4:2"),
        ("wanda", {"pattern": "half"}, "methods[1].pattern", "half"),
        ("wanda", {"sparsity": 1.5}, "methods[1].sparsity", "1.5"),
        ("magnitude", {"scope": "block"}, "methods[1].scope", "block"),
        ("nf4", {"block_size": 100}, "methods[1].block_size", "100"),
        ("gptq", {"damping": 0}, "methods[1].damping", "0"),
        ("gptq", {"token_clip": float("inf")}, "methods[1].token_clip", "inf: Input should be a finite number"),
        ("wanda", {"pattern": "\u00b2:4"}, "methods[1].pattern", "neither 'unstructured' nor N:M"),
        ("gptq", {"variant": {"reference": None}}, "methods[1].variant", "Input should be 'comptrust' or 'reference'"),
    ],
)
def test_bad_values_say_where_and_what(method, params, where, says):
    with pytest.raises(BadInput, match=says) as e:
        check(method, params, where="methods[1]")
    assert e.value.where == where or e.value.where.startswith(where)
    assert e.value.fix


def test_a_pattern_implies_its_sparsity_and_zero_group_means_per_channel():
    assert check("wanda", {"pattern": "2:4"})["sparsity"] == 0.5
    assert check("wanda", {"pattern": "1:4"})["sparsity"] == 0.75
    assert check("wanda", {"pattern": None, "sparsity": 0.3})["pattern"] == "unstructured"
    assert check("wanda", {"pattern": "02:4"}) == check("wanda", {"pattern": "2:4"})
    assert check("rtn", {"group_size": 0})["group_size"] is None


def test_variants_fill_in_their_knobs():
    assert check("gptq", {"variant": "reference"})["damping"] == 0.01
    assert check("gptq", {})["order"] == "group-aware"
    assert check("sparsegpt", {"pattern": "2:4"})["token_clip"] == 8


@pytest.mark.parametrize(
    ("method", "params", "says"),
    [
        ("rtn", {}, "128 does not divide the 576 inputs of model.layers.0.self_attn.q_proj (try 96)"),
        ("gptq", {"group_size": 512}, "512 does not divide"),
        ("wanda", {"pattern": "2:4", "sparsity": 0.3}, "pattern 2:4 means sparsity 0.5, but sparsity is 0.3"),
        ("wanda", {"pattern": "3:7"}, "3:7 does not divide"),
        ("sparsegpt", {"group_size": 64}, "without bits"),
        ("sparsegpt", {"pattern": "2:4", "bits": 4, "group_size": 18}, "group size 18 tears groups of 4 apart"),
        ("sparsegpt", {"pattern": "1:2", "bits": 4, "group_size": 18}, "of 4 apart, which 1:2 is stored in (try 20)"),
        ("nf4", {"bits": 3}, "4 bits, not 3"),
        ("fp4", {"bits": 8}, "4 bits, not 8"),
        ("nf4", {"block_size": 128}, "128 does not divide the 576"),
        ("llm_int8", {"bits": 4}, "8 bits, not 4"),
        ("smoothquant", {"bits": 4}, "W8A8"),
        (
            "rtn",
            {"group_size": 64, "overrides": {"*.1.mlp.down_proj": {"group_size": 1024}}},
            "1536 inputs of model.layers.1.mlp.down_proj",
        ),
        (
            "magnitude",
            {"skip": ["*.0.mlp.down"]},
            "'*.0.mlp.down' of skip matches no layer; one is model.layers.0.self_attn.q_proj",
        ),
        ("magnitude", {"overrides": {"layers.*": {"sparsity": 0.1}}}, "'layers.*' of overrides matches no layer"),
        ("magnitude", {"skip": ["*"]}, "skip ['*'] leaves no layer to compress"),
    ],
)
def test_impossible_combinations_have_a_reason(config, method, params, says):
    check(method, params)  # each value alone is fine
    assert says in incompatible(method, params, config)
    assert says in incompatible(method, params, config.to_dict())


def test_the_group_size_that_a_reason_names_fits_every_layer():
    config = make_llama(hidden=64, intermediate=96).config
    assert incompatible("rtn", {}, config).endswith("the 64 inputs of model.layers.0.self_attn.q_proj (try 32)")
    assert incompatible("rtn", {"skip": ["*down_proj"]}, config).endswith("(try 64)")
    assert incompatible("rtn", {"group_size": 64, "overrides": {"*.1.*": {"bits": 8}}}, config).endswith("down_proj (try 32)")
    eights = {"pattern": "8:16", "bits": 4, "group_size": 48}
    assert incompatible("sparsegpt", eights, make_llama(hidden=32, intermediate=80).config).endswith("q_proj (try 16)")


def test_a_config_that_transformers_does_not_take_is_a_reason():
    config = make_llama().config.to_dict() | {"hidden_act": "nope"}
    assert "transformers cannot make a model of this config (KeyError: 'nope')" in incompatible("rtn", {}, config)


def test_one_of_two_with_4_bits_is_stored_by_fours():
    odd = make_llama(intermediate=90).config
    assert "the 90 inputs of model.layers.0.mlp.down_proj" in incompatible("sparsegpt", {"pattern": "1:2", "bits": 4}, odd)
    assert incompatible("sparsegpt", {"pattern": "1:2"}, odd) is None


def test_possible_combinations_have_none(config):
    for method, params in [
        ("sparsegpt", {"pattern": "1:2", "bits": 4}),
        ("dense", {}), ("rtn", {"group_size": 64}), ("gptq", {"group_size": None}), ("wanda", {"pattern": "8:16"}), ("nf4", {}),
        ("rtn", {"group_size": 128, "skip": ["*.self_attn.*", "*.gate_proj", "*.up_proj"]}),
    ]:  # fmt: skip
        assert incompatible(method, params, config) is None, method


def test_an_unsupported_architecture_is_a_reason_too():
    from transformers import GPT2Config

    tiny = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    assert "not in an nn.Linear" in incompatible("rtn", {"group_size": 16}, tiny)
    assert incompatible("dense", {}, tiny).startswith("GPT2LMHeadModel: ")


def test_tokens_needed_are_known_without_weights(config):
    assert required_tokens("gptq", {"group_size": 64}, config) == 1536
    assert required_tokens("wanda", {}, config) == 1
    assert required_tokens("rtn", {}, config) == 0


def test_the_order_of_overrides_is_no_part_of_a_cell():
    """Two orders have one key, so they are one compression."""
    globs = {"*.q_proj": {"bits": 8}, "*": {"bits": 3, "group_size": 32}}
    there, back = (check("rtn", {"overrides": dict(items)}) for items in (globs.items(), reversed(globs.items())))
    assert canonical(there) == canonical(back)
    for params in (there, back):
        made = compress(make_llama(), "rtn", params).stored
        assert (made["model.layers.0.self_attn.q_proj"].bits, made["model.layers.0.self_attn.k_proj"].bits) == (8, 3)


@pytest.mark.parametrize("method", ["gptq", "sparsegpt"])
def test_a_layer_that_stays_dense_needs_no_tokens(method):
    """down_proj is the widest of this model, and skipped: 64 inputs are left."""
    model = make_llama()
    params = {"skip": ["*.down_proj"], **({"group_size": 32} if method == "gptq" else {})}
    assert required_tokens(method, params, model.config) == 64
    assert compress(model, method, params, torch.arange(64)[None]).layers
    with pytest.raises(BadInput, match="64 x 64 Hessian: it needs 64 calibration tokens or more, not 63"):
        compress(model, method, params, torch.arange(63)[None])
    with pytest.raises(BadInput, match=r"'\*\.down' of skip matches no layer"):
        compress(model, method, params | {"skip": ["*.down"]}, torch.arange(64)[None])


@pytest.mark.parametrize(
    ("made", "params", "works"),
    [
        ("rtn", {"group_size": 32}, False),
        ("rtn", {"group_size": 32, "symmetric": False}, True),
        ("llm_int8", {}, False),
        ("nf4", {}, False),
    ],
)
def test_a_model_that_is_quantised_already_is_refused_unless_it_loads_dense(tmp_path, made, params, works):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "out"
    export(compress(make_llama(), made, params), None, folder)
    config = AutoConfig.from_pretrained(folder)
    why = incompatible("magnitude", {}, config)
    assert why is None if works else "quantised already" in why and "dense one" in why
    assert incompatible("dense", {}, config) is None
    model = AutoModelForCausalLM.from_pretrained(folder)
    if works:
        assert compress(model, "magnitude", {}).sparsity_reached == 0.5
    else:
        with pytest.raises(BadInput, match="q_proj is quantised already"):
            compress(model, "magnitude", {})
