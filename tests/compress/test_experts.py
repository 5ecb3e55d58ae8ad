"""Mixtures of experts: what transformers holds in one tensor is compressed expert by expert, and goes back into its checkpoints."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comptrust.actors import models
from comptrust.actors.compress import artifacts, backends, check, compress, compress_many, engine, gblm, incompatible
from comptrust.actors.compress.experts import all_tokens, has_fused, joined, mixtures, split_experts
from comptrust.actors.compress.export import check_format, export
from comptrust.actors.compress.reading import read_checkpoint
from comptrust.actors.compress.structure import clone, decoder_blocks, named_linears
from comptrust.actors.errors import BadInput
from safetensors.torch import load_file
from tiny import make_tiny_model

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "max_position_embeddings": 512, "pad_token_id": 0, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
KINDS = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "granitemoe",
    "phimoe",
    "ernie4_5_moe",
    "glm4_moe",
    "minimax_m2",
]
#: Names of an expert's layers in the checkpoints of an architecture.
LEAVES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


def mixture(kind: str, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    default = AutoConfig.for_model(kind)
    heads = {"num_key_value_heads": 4 if hasattr(default, "kv_lora_rank") else 2, "head_dim": 16}
    sizes = {name: value for name, value in (SIZES | heads).items() if hasattr(default, name)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | changes))).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(0, 0.15)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_split_experts_compute_what_the_fused_ones_do(kind, tokens):
    model = mixture(kind).double()
    model.set_experts_implementation("eager")  # the other ones know no float64
    before = {name: p.clone() for name, p in model.named_parameters()}
    split = split_experts(clone(model))
    assert has_fused(model) and not has_fused(split)
    for found in mixtures(split).values():
        assert found.num_experts == 6
    expected = model(tokens).logits
    torch.testing.assert_close(split(tokens).logits, expected, rtol=1e-10, atol=1e-10)
    with all_tokens(split):
        torch.testing.assert_close(split(tokens).logits, expected, rtol=1e-10, atol=1e-10)
    assert not any(m.all_tokens for m in mixtures(split).values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {p.untyped_storage()._cdata for p in split.parameters()} == {p.untyped_storage()._cdata for p in model.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("rtn", {"bits": 4, "group_size": 16}),
        ("wanda", {"pattern": "2:4"}),
        ("gptq", {"bits": 4, "group_size": 16, "skip": ["*.1.*"]}),
    ],
)
@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "granitemoe"])
def test_evaluation_lets_transformers_compute_all_experts_at_once(kind, method, params, dtype, tokens):
    dense = split_experts(mixture(kind).to(dtype))
    held = {name: p.data_ptr() for name, p in dense.named_parameters()}
    cell = compress(dense, method, params, tokens).model
    for model in (dense, cell):
        alone = model(tokens).logits
        with joined(model):
            assert all(m.joined for m in mixtures(model).values())
            together = model(tokens).logits
            memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
            for m in mixtures(model).values():
                for whole in (m.fused.gate_up_proj, m.fused.down_proj):
                    assert whole.untyped_storage().data_ptr() in memory
        assert sum(memory.values()) <= 1.01 * sum(p.nbytes for p in model.parameters())
        torch.testing.assert_close(
            together, alone, rtol=0, atol=(1e-4 if dtype == torch.float32 else 0.05) * float(alone.abs().max())
        )
        assert torch.equal(model(tokens).logits, alone)
        assert not any(hasattr(m.fused, "down_proj") for m in mixtures(model).values())
    assert {name: p.data_ptr() for name, p in dense.named_parameters()} == held


@pytest.mark.parametrize(("method", "params"), [("smoothquant", {}), ("nf4", {"skip": ["*.down_proj"]})])
def test_experts_that_are_no_plain_weights_stay_alone(method, params, tokens):
    cell = compress(split_experts(mixture("qwen3_moe")), method, params, tokens).model
    alone = cell(tokens).logits
    with joined(cell):
        assert not any(m.joined for m in mixtures(cell).values())
        assert torch.equal(cell(tokens).logits, alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_expert_compresses_and_the_routers_stay(kind, method, tokens):
    model = mixture(kind)
    params = {"bits": 8, "group_size": 16}
    assert incompatible(method, params, model.config) is None
    done = compress(model, method, params, tokens)
    split = split_experts(clone(model))
    stored = {
        name for found, m in mixtures(split).items() for name in named_linears(*decoder_blocks(split)) if name.startswith(found)
    }
    assert stored == {name for name in done.stored if re.search(r"experts\.\d", name)} and len(stored) in (18, 36)
    assert not [name for name in done.stored if re.search(r"(gate|router|expert_gate)$", name)]
    assert all(s.input_scale is None for s in done.stored.values())
    logits = model(tokens).logits
    error = (done.model(tokens).logits - logits).norm(dim=-1) / logits.norm(dim=-1)
    assert 0 < error.median() < 0.06  # of the median token: some others choose another expert now
    for (name, old), new in zip(split.named_parameters(), done.model.parameters(), strict=True):
        if method == "gptq" and name.removesuffix(".weight") not in done.stored:
            assert old.data_ptr() == new.data_ptr()


def test_a_shared_expert_as_wide_as_the_routed_ones_are_many_is_no_router():
    """Qwen3-Next has 512 experts and a shared one of 512."""
    model = split_experts(mixture("qwen2_moe", num_experts=32))
    got = set(named_linears(*decoder_blocks(model)))
    assert {f"model.layers.1.mlp.shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down")} < got
    assert not {"model.layers.1.mlp.gate", "model.layers.1.mlp.shared_expert_gate"} & got


def test_an_expert_is_pruned_on_all_tokens_of_its_layer(tokens):
    """Wanda's masks by NumPy, from inputs that hooks on transformers' own modules saw."""
    model = mixture("mixtral")
    seen = []
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda m, args: seen.append(args[0].numpy().astype(np.float64)))
    done = compress(model, "wanda", {"sparsity": 0.5, "skip": ["*.self_attn.*"]}, tokens)
    seen.clear()
    model(tokens)
    hook.remove()
    X = seen[0]
    assert X.shape == (8 * 48, 64)

    def half(W, inputs):
        score = np.abs(W) * np.sqrt((inputs**2).sum(0))
        return W * (score >= np.sort(score, 1)[:, [W.shape[1] // 2]])

    for e in range(6):
        gate, up = experts.gate_up_proj[e].numpy().astype(np.float64).reshape(2, 64, 64)
        new = {
            leaf: done.model.get_submodule(f"model.layers.0.mlp.experts.{e}.{leaf}_proj").weight.numpy()
            for leaf in ("gate", "up", "down")
        }
        np.testing.assert_array_equal(new["gate"], half(gate, X).astype(np.float32))
        np.testing.assert_array_equal(new["up"], half(up, X).astype(np.float32))
        g, u = X @ new["gate"].T, X @ new["up"].T
        middle = g / (1 + np.exp(-g)) * u
        np.testing.assert_array_equal(
            new["down"], half(experts.down_proj[e].numpy().astype(np.float64), middle).astype(np.float32)
        )


def test_gradients_are_those_of_the_fused_weights(tokens):
    model = mixture("qwen3_moe")
    split = split_experts(clone(model))
    linears = named_linears(*decoder_blocks(split))
    got = gblm.prepare(split, linears, gblm.GblmConfig(), tokens=tokens, places=[torch.device("cpu")] * 2)
    fused = [layer.mlp.experts for layer in model.model.layers]
    squares = [torch.zeros_like(m.gate_up_proj) for m in fused], [torch.zeros_like(m.down_proj) for m in fused]
    for m in fused:
        m.requires_grad_(True)
    for row in tokens.split(1):
        model.zero_grad()
        F.cross_entropy(model(row).logits[0, :-1], row[0, 1:]).backward()
        for i, m in enumerate(fused):
            squares[0][i] += m.gate_up_proj.grad.square()
            squares[1][i] += m.down_proj.grad.square()
    for i in range(2):
        for e in range(6):
            gate, up = squares[0][i][e].sqrt().chunk(2)
            for leaf, expected in (("gate", gate), ("up", up), ("down", squares[1][i][e].sqrt())):
                norm = got.norms[f"model.layers.{i}.mlp.experts.{e}.{leaf}_proj"]
                torch.testing.assert_close(norm, expected, rtol=1e-3, atol=1e-6)


def test_chunks_give_what_one_batch_gives(tokens):
    model = mixture("qwen2_moe")
    params = {"sparsity": 0.5}
    whole, pieces = (compress_many(model, [("wanda", params)], tokens, chunk_tokens=n)[0] for n in (None, 48))
    same = [torch.equal(a, b) for a, b in zip(whole.model.parameters(), pieces.model.parameters(), strict=True)]
    assert np.mean(same) > 0.8  # the order of sums may turn a tie
    for a, b in zip(whole.layers, pieces.layers, strict=True):
        assert a["layer"] == b["layer"] and b["error"] == pytest.approx(a["error"], rel=0.25)  # other signs in the sketch


def test_the_hessians_of_experts_gathered_together_have_a_limit(tokens, monkeypatch):
    model, params = mixture("qwen3_moe"), {"bits": 4, "group_size": 16}
    passes = []
    forward = engine.BlockPass.forward
    monkeypatch.setattr(
        engine.BlockPass, "forward", lambda self, i, at, *a, **k: passes.append(len(at)) or forward(self, i, at, *a, **k)
    )

    def run():
        passes.clear()
        return compress_many(model, [("gptq", params)], tokens, chunk_tokens=48)[0].model, max(passes)

    (all_at_once, most), two = run(), 2 * 4 * 32**2
    assert most == 6
    monkeypatch.setattr(engine, "HESSIANS", two)
    by_twos, most = run()
    assert most == 2
    assert all(torch.equal(a, b) for a, b in zip(all_at_once.parameters(), by_twos.parameters(), strict=True))
    monkeypatch.setattr(engine, "HESSIANS", 0)
    assert run()[1] == 1


def test_an_artefact_gives_the_same_model_again(tokens):
    dense = split_experts(mixture("qwen3_moe"))
    done = compress(dense, "gptq", {"bits": 4, "group_size": 16}, tokens)
    tensors, meta = artifacts.dump(done, dense)
    assert not [name for name in tensors if name.startswith("weight:")]
    again = artifacts.restore(dense, tensors, meta)
    assert torch.equal(again.model(tokens).logits, done.model(tokens).logits)


@pytest.mark.parametrize(
    ("method", "params", "format"),
    [
        ("gptq", {"bits": 4, "group_size": 16}, "compressed-tensors"),
        ("rtn", {"bits": 8, "group_size": None, "skip": ["*.self_attn.*"]}, "compressed-tensors"),
        ("rtn", {"bits": 4, "group_size": 16, "symmetric": False}, "dense"),
        ("rtn", {"bits": 4, "group_size": 16, "skip": ["*.experts.3.up_proj"]}, "dense"),
        ("rtn", {"bits": 4, "group_size": 16, "overrides": {"*.self_attn.*": {"bits": 8}}}, "dense"),
        ("wanda", {"pattern": "2:4"}, "dense"),
    ],
)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granitemoe"])
def test_exported_experts_load_under_the_names_of_their_architecture(tmp_path, tokens, kind, method, params, format):
    from transformers import AutoModelForCausalLM

    model = mixture(kind)
    format = "dense" if kind == "granitemoe" else format  # whose checkpoints hold all experts in one tensor
    check_format(format, method, check(method, params), model.config)
    done = compress(model, method, params, tokens)
    exported = export(done, None, tmp_path / "out")
    assert exported.format == format
    names = set(load_file(exported.path / "model.safetensors"))
    if format == "dense":
        model.save_pretrained(tmp_path / "transformers")
        assert names == set(load_file(tmp_path / "transformers" / "model.safetensors"))
    else:
        where = "block_sparse_moe" if kind == "mixtral" else "mlp"
        assert {f"model.layers.1.{where}.experts.5.{leaf}.weight_packed" for leaf in LEAVES[kind]} < names
    back = AutoModelForCausalLM.from_pretrained(exported.path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(back(tokens).logits, done.model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granitemoe"])
def test_an_exported_mixture_reads_back(tmp_path, kind):
    dense = split_experts(mixture(kind))
    for method, params, pattern in [
        ("rtn", {"bits": 4, "group_size": 16}, None),
        ("magnitude", {"sparsity": 0.5}, "unstructured"),
    ]:
        if (kind, method) == ("granitemoe", "rtn"):
            continue  # written dense: no codes to read
        done = compress(dense, method, params)
        back = read_checkpoint(export(done, None, tmp_path / method).path, dense, pattern=pattern)
        assert back.stored.keys() == done.stored.keys()
        assert all(torch.equal(a, b) for a, b in zip(back.model.parameters(), done.model.parameters(), strict=True))


def test_auto_does_not_advise_auto(tmp_path, tokens):
    model = mixture("qwen3_moe", moe_intermediate_size=64)
    for method in ("smoothquant", "nf4", "llm_int8"):
        done = compress(model, method, {}, tokens)
        with pytest.raises(BadInput) as refused:
            export(done, None, tmp_path / method)
        assert refused.value.fix == "Take another method"


def test_a_loaded_mixture_is_split(tmp_path):
    folder = make_tiny_model(tmp_path / "tokenizer")
    model = mixture("qwen3_moe", tie_word_embeddings=True)
    model.resize_token_embeddings(600)
    model.save_pretrained(folder)
    loaded, _ = models.load(models.resolve(str(folder)))
    assert len(mixtures(loaded)) == 2
    ids = torch.arange(40)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_an_exported_mixture_in_bfloat16_loads_in_one_dtype(tmp_path, tokens):
    """transformers makes experts dense in the dtype of the scales, which bfloat16 may not hold."""
    folder = make_tiny_model(tmp_path / "tokenizer")
    model = mixture("qwen3_moe")
    model.resize_token_embeddings(600)
    model.bfloat16().save_pretrained(folder)
    dense, tokenizer = models.load(models.resolve(str(folder)), dtype="bfloat16")
    done = compress(dense, "rtn", {"bits": 8, "group_size": 16})
    exported = export(done, tokenizer, tmp_path / "out")
    assert exported.format == "compressed-tensors"
    back, _ = models.load(models.resolve(str(exported.path)), dtype="bfloat16")
    logits, expected = back(tokens).logits, done.model(tokens).logits
    assert ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.02


def test_what_is_not_to_be_had_is_refused_with_the_reason(tokens):
    oss = mixture("gpt_oss", layer_types=["full_attention"] * 2)
    why = incompatible("rtn", {}, oss.config)
    assert "model.layers.0.mlp.experts.gate_up_proj [6, 64, 128] holds fused experts of a mixture" in why and "gpt-oss" in why
    with pytest.raises(BadInput, match="fused experts of a mixture"):
        compress(oss, "rtn", {"group_size": 16})
    config = mixture("qwen3_moe").config
    assert "by comptrust's own methods only" in backends.incompatible("gptqmodel", "gptq", {"group_size": 16}, config)
    for format, params in [("gptq", {"group_size": 16}), ("awq", {"group_size": 16})]:
        with pytest.raises(
            BadInput, match=r"transformers reads no mixture of experts from .*One of: auto, compressed-tensors, dense"
        ):
            check_format(format, "rtn", check("rtn", params), config)
    with pytest.raises(BadInput, match="zero points"):
        check_format("compressed-tensors", "rtn", check("rtn", {"group_size": 16, "symmetric": False}), config)
    with pytest.raises(BadInput, match="Take another method"):
        check_format("auto", "smoothquant", check("smoothquant", {}), config)
