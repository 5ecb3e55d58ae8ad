"""What the engine promises whatever the method: nothing shared is touched, one block at a time, one pass for many cells."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from comptrust.actors.compress import METHODS, check, compress, compress_many, engine, incompatible
from comptrust.actors.compress.export import export
from comptrust.actors.compress.structure import clone, decoder_blocks, discover
from comptrust.actors.errors import BadInput, CellError
from small_models import make_llama
from torch.utils._python_dispatch import TorchDispatchMode

CELLS = [
    ("dense", {}),
    ("rtn", {"bits": 3, "group_size": 32}),
    ("gptq", {"bits": 4, "group_size": 32}),
    ("gptq", {"bits": 4, "group_size": 32, "variant": "reference"}),
    ("awq", {"bits": 4, "group_size": 32}),
    ("smoothquant", {}),
    ("magnitude", {"pattern": "2:4"}),
    ("wanda", {"sparsity": 0.4}),
    ("sparsegpt", {"pattern": "4:8"}),
    ("gblm", {}),
    ("nf4", {}),
    ("llm_int8", {}),
]


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


@pytest.fixture(scope="module")
def many(llama, tokens):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    modules = list(llama.named_modules())
    done = compress_many(llama, CELLS, tokens)
    assert all(torch.equal(before[k], v) for k, v in llama.state_dict().items())
    assert modules == list(llama.named_modules()) and not any(p.requires_grad for p in llama.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for _, m in modules)
    return done


def test_every_method_is_in_the_table():
    assert {m for m, _ in CELLS} | {"fp4"} == set(METHODS)


@pytest.mark.parametrize("i", range(len(CELLS)), ids=[m for m, _ in CELLS])
def test_one_pass_gives_each_cell_what_its_own_run_gives(llama, tokens, many, i):
    alone = compress(llama, *CELLS[i], tokens)
    assert same(alone.model, many[i].model)
    assert alone.layers == many[i].layers and alone.size_bytes == many[i].size_bytes


def test_untouched_tensors_are_shared_and_the_copy_runs(llama, tokens, many):
    for done in many:
        assert done.model.model.embed_tokens.weight is llama.model.embed_tokens.weight
        assert done.model.lm_head.weight is llama.lm_head.weight
        assert torch.isfinite(done.model(tokens[:2]).logits).all()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in done.model.modules())


def test_sizes_add_up_from_what_is_stored(llama, many):
    dense, rtn = many[0], many[1]
    parameters = sum(p.numel() for p in llama.parameters())  # tied embedding once
    assert dense.size_bytes == 4 * parameters and dense.parameters == parameters and dense.bits_per_weight == 32
    weights = sum(s.shape[0] * s.shape[1] for s in rtn.stored.values())
    assert rtn.size_bytes == 4 * (parameters - weights) + weights * 3 // 8 + 2 * weights // 32
    assert rtn.bits_per_weight == pytest.approx(3 + 16 / 32)
    for done in many[1:]:
        assert len(done.layers) == len(done.stored) == 14
        assert 8 * sum(s.size_bytes for s in done.stored.values()) / weights == pytest.approx(done.bits_per_weight)
        assert [row["bits"] for row in done.layers] == [
            8 * s.size_bytes / (s.shape[0] * s.shape[1]) for s in done.stored.values()
        ]
    awq = many[4]  # scales of inputs are folded away: codes, a float16 scale and a 4-bit zero point a group are left
    assert {row["bits"] for row in awq.layers} == {4 + (16 + 4) / 32}


@pytest.mark.parametrize("widths", [(64, 192), (72, 100), (80, 208)])
def test_sizes_are_those_of_the_packed_form_at_any_width(widths):
    """Rows are padded to whole words, which widths that are no multiple of 32 show."""
    from comptrust.kernels.formats import pack, packed_bytes

    model = make_llama(layers=1, hidden=widths[0], intermediate=widths[1])
    for params, form in [
        ({"pattern": "1:2"}, "2:4"),
        ({"pattern": "2:4"}, "2:4"),
        ({"sparsity": 0.6}, "bitmap"),
        ({"pattern": "8:16"}, "8:16"),
        ({"pattern": "4:8"}, "4:8"),
    ]:
        if form in ("8:16", "4:8") and widths[1] == 100:
            continue
        done = compress(model, "magnitude", params)
        for name, stored in done.stored.items():
            assert stored.size_bytes == packed_bytes(pack(done.model.get_submodule(name).weight, form)), (name, form)
    for bits in (3, 4, 8):
        done = compress(model, "rtn", {"bits": bits, "group_size": None})
        for name, stored in done.stored.items():
            packed = pack(done.model.get_submodule(name).weight, f"int{bits}", scale=stored.scale)
            assert stored.size_bytes == packed_bytes(packed), (name, bits)


def test_pruned_sizes_are_those_of_the_packed_form(llama, tokens):
    from comptrust.kernels.formats import pack, packed_bytes

    for params, form in [
        ({"pattern": "2:4"}, "2:4"),
        ({"pattern": "4:8"}, "4:8"),
        ({"pattern": "8:16"}, "8:16"),
        ({"sparsity": 0.6}, "bitmap"),
    ]:
        done = compress(llama, "wanda", params, tokens)
        for name, stored in done.stored.items():
            assert stored.size_bytes == packed_bytes(pack(done.model.get_submodule(name).weight, form)), (name, form)
    done = compress(llama, "sparsegpt", {"pattern": "2:4", "bits": 4, "group_size": 32}, tokens)
    for name, stored in done.stored.items():
        packed = pack(done.model.get_submodule(name).weight, "2:4+int4", scale=stored.scale, group_size=32)
        assert stored.size_bytes == packed_bytes(packed), name


@pytest.mark.parametrize("i", [i for i, (m, _) in enumerate(CELLS) if METHODS[m].needs_calibration])
def test_chunks_change_nothing_but_the_order_of_sums(llama, tokens, many, i):
    (chunked,) = compress_many(llama, [CELLS[i]], tokens, chunk_tokens=100)
    whole = many[i]
    x = tokens[:2]
    for name in list(whole.stored)[
        :2
    ]:  # later ones may differ: a weight halfway between two codes is rounded by the order of sums
        a, b = (m.model.get_submodule(name).weight for m in (chunked, whole))
        assert torch.isclose(a, b, rtol=1e-3, atol=1e-6).float().mean() > 0.98, name
    assert (chunked.model(x).logits - whole.model(x).logits).norm() < 0.15 * whole.model(x).logits.norm()
    for a, b in zip(chunked.layers, whole.layers, strict=True):
        assert a["error"] == pytest.approx(b["error"], rel=0.1)  # the sketch draws other signs


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "gblm", "nf4", "smoothquant"])
def test_streaming_to_another_device_gives_the_same(llama, tokens, method):
    """cpu:0 is not cpu to torch, so tensors are copied there and back as they would be to a GPU."""
    i = [m for m, _ in CELLS].index(method)
    spec = METHODS[method]
    config = spec.config.model_validate(CELLS[i][1])
    (streamed,) = engine.run(llama, [(spec, config)], tokens, device=torch.device("cpu", 0))
    whole = compress(llama, *CELLS[i], tokens)
    assert same(streamed.model, whole.model)
    compressed = dict(whole.model.named_parameters())
    untouched = [n for n, p in llama.named_parameters() if compressed.get(n) is p]
    assert "model.norm.weight" in untouched
    for n in untouched:
        assert streamed.model.get_parameter(n) is llama.get_parameter(n)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages made under it and still alive."""

    def __init__(self):
        super().__init__()
        self.seen, self.live, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key, nbytes):
        self.seen.discard(key)
        self.live -= nbytes


def working_set(layers: int, tokens: torch.Tensor, cells) -> int:
    """Most bytes held during a streamed compression beyond what its result keeps."""
    model = make_llama(layers=layers)
    specs = [(METHODS[m], METHODS[m].config.model_validate(p)) for m, p in cells]
    gc.collect()
    with LiveBytes() as bytes_:
        done = engine.run(model, specs, tokens, device=torch.device("cpu", 0))
    gc.collect()
    kept = 0
    for cell in done:
        shared = {p.data_ptr() for p in model.parameters()}
        kept += sum(p.numel() * 4 for p in cell.model.parameters() if p.data_ptr() not in shared)
        kept += sum(t.numel() * t.element_size() for s in cell.stored.values() for t in (s.codes, s.scale) if t is not None)
    return bytes_.peak - kept


@pytest.mark.parametrize("method", ["gptq", "wanda"])
def test_the_working_set_is_one_block_whatever_the_depth(tokens, method):
    cells = [(method, {"group_size": 32} if method == "gptq" else {})]
    tokens = tokens[:4]
    working_set(1, tokens, cells)  # first calls make lasting tensors of torch's own
    shallow, deep = working_set(2, tokens, cells), working_set(6, tokens, cells)
    block = 4 * sum(p.numel() for p in make_llama(layers=1).model.layers.parameters())
    assert abs(deep - shallow) < block / 2  # four blocks more


@pytest.mark.gpu
def test_device_memory_is_one_block_on_a_gpu(tokens):
    peaks = []
    for layers in (2, 8):
        model = make_llama(layers=layers, hidden=512, intermediate=1536)
        torch.cuda.reset_peak_memory_stats()
        compress(model, "gptq", {"group_size": 64}, tokens.repeat(8, 1), device="cuda")
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.2 * peaks[0]


def test_skip_and_overrides_go_by_layer(llama, tokens):
    params = {
        "bits": 4,
        "group_size": 32,
        "skip": ["*.0.self_attn.*"],
        "overrides": {"*.down_proj": {"bits": 8}, "*.1.mlp.up_proj": {"bits": 3}},
    }
    done = compress(llama, "gptq", params, tokens)
    bits = {row["layer"].removeprefix("model.layers."): done.stored[row["layer"]].bits for row in done.layers}
    assert "0.self_attn.q_proj" not in bits and len(bits) == 10
    assert bits["0.mlp.down_proj"] == 8 and bits["1.mlp.up_proj"] == 3 and bits["1.mlp.gate_proj"] == 4
    assert done.model.model.layers[0].self_attn.q_proj.weight is llama.model.layers[0].self_attn.q_proj.weight
    assert done.stored["model.layers.0.mlp.down_proj"].codes.abs().max() > 8


@pytest.mark.parametrize(
    ("method", "base", "changed"),
    [
        ("sparsegpt", {}, {"pattern": "2:4"}),
        ("sparsegpt", {}, {"bits": 4, "group_size": 32}),
        ("sparsegpt", {}, {"variant": "reference"}),
        ("wanda", {}, {"pattern": "1:4"}),
        ("gptq", {"group_size": 32}, {"variant": "reference"}),
        ("magnitude", {"scope": "row"}, {"pattern": "4:8"}),
    ],
)
def test_an_override_means_the_same_however_its_base_is_written(llama, tokens, method, base, changed):
    """Its values bring their own defaults, also where the base has every default written out, as a cell's JSON has."""
    params = {**base, "overrides": {"*.q_proj": changed}}
    plain, filled = (compress(llama, method, p, tokens) for p in (params, check(method, params)))
    for (name, a), b in zip(plain.model.named_parameters(), filled.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    first = "model.layers.0.self_attn.q_proj"
    alone = compress(llama, method, {**base, **changed} | ({"dense_inputs": False} if method == "wanda" else {}), tokens)
    assert torch.equal(plain.model.get_submodule(first).weight, alone.model.get_submodule(first).weight)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gblm"])
def test_a_pattern_in_an_override_brings_its_sparsity_whatever_the_base_has(method):
    """A base with another sparsity than the pattern's made the cell impossible, for no reason that the override named."""
    spec = METHODS[method].config
    config = spec.model_validate(check(method, {"sparsity": 0.6, "overrides": {"*q": {"pattern": "1:4"}, "*k": {}}}))
    assert [config.for_layer(n).sparsity for n in ("q", "k")] == [0.75, 0.6]
    assert config.for_layer("q").impossible() is None
    both = spec.model_validate({"overrides": {"*q": {"pattern": "1:4", "sparsity": 0.6}}})
    assert "pattern 1:4 means sparsity 0.75" in both.for_layer("q").impossible()


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("gptq", {"overrides": {"*": {"skip": ["x"]}}}),
        ("gptq", {"overrides": {"*": {"bits": 5}}}),
        ("wanda", {"overrides": {"*": {"dense_inputs": True}}}),
        ("wanda", {"overrides": {"*": {"variant": "reference"}}}),
        ("gblm", {"overrides": {"*": {"dense_inputs": False}}}),
        ("magnitude", {"overrides": {"*": {"scope": "global"}}}),
        ("magnitude", {"scope": "global", "overrides": {"*": {"sparsity": 0.1}}}),
        ("magnitude", {"scope": "global", "overrides": {"*": {"pattern": "2:4"}}}),
        ("llm_int8", {"overrides": {"*": {"threshold": 5}}}),
    ],
)
def test_overrides_are_checked_like_parameters_and_leave_the_whole_cell_alone(method, params):
    *_, changed = params["overrides"]["*"]
    with pytest.raises(BadInput, match=changed if method != "gptq" else "skip|bits 5: Input should be 2, 3, 4 or 8") as e:
        check(method, params)
    assert "overrides['*'] holds" in str(e.value)  # the base may hold the same parameter, with a good value


def test_layer_errors_are_output_errors(llama, tokens):
    """The sketch against the definition ||(W - W')X|| / ||WX|| on the inputs themselves."""
    done = compress(llama, "gptq", {"bits": 3, "group_size": 32}, tokens)
    seen = {}
    modules = {r["layer"]: done.model.get_submodule(r["layer"]) for r in done.layers}
    hooks = [
        m.register_forward_pre_hook(lambda _, a, n=n: seen.__setitem__(n, a[0].reshape(-1, a[0].shape[-1])))
        for n, m in modules.items()
    ]
    done.model(tokens)
    for hook in hooks:
        hook.remove()
    for row in done.layers:
        W, V, X = llama.get_submodule(row["layer"]).weight, modules[row["layer"]].weight, seen[row["layer"]]
        assert row["error"] == pytest.approx(float((X @ (W - V).T).norm() / (X @ W.T).norm()), rel=0.35)


def test_progress_counts_blocks(llama, tokens):
    seen = []
    compress(llama, "wanda", {}, tokens, progress=lambda *a: seen.append(a))
    assert seen == [("compress", 1, 2), ("compress", 2, 2)]


def test_half_precision_models_stay_in_their_dtype(tokens):
    model = make_llama().bfloat16()
    for method, params in [("gptq", {"group_size": 32}), ("sparsegpt", {"pattern": "2:4"}), ("awq", {"group_size": 32})]:
        done = compress(model, method, params, tokens)
        assert {p.dtype for p in done.model.parameters()} == {torch.bfloat16}
        assert torch.isfinite(done.model(tokens[:1]).logits).all()
    assert done.size_bytes < 2 * done.parameters


def test_non_finite_activations_name_the_layer(tokens):
    model = make_llama()
    model.model.layers[1].post_attention_layernorm.weight.fill_(float("inf"))
    with pytest.raises(CellError, match=r"model\.layers\.1\.mlp\.gate_proj"):
        compress(model, "wanda", {}, tokens)


@pytest.mark.parametrize(("method", "params"), [("rtn", {"group_size": 32}), ("magnitude", {}), ("gptq", {"group_size": 32})])
def test_weights_that_are_not_finite_name_the_layer(tokens, method, params):
    model = make_llama()
    model.model.layers[0].mlp.down_proj.weight[3, 5] = float("inf")
    with pytest.raises(CellError, match=r"model\.layers\.0\.mlp\.down_proj: the model's own weights are not finite"):
        compress(model, method, params, tokens)


def test_too_few_tokens_names_the_number(llama, tokens):
    with pytest.raises(BadInput, match=r"192 calibration tokens or more, not 96.*Raise samples to 4"):
        compress(llama, "gptq", {"group_size": 32}, tokens[:2])
    compress(llama, "wanda", {}, tokens[:2])


@pytest.mark.parametrize(
    "bad", [None, torch.zeros(4, 8), torch.zeros(8, dtype=torch.int64), torch.zeros(0, 8, dtype=torch.int64)]
)
def test_tokens_of_the_wrong_form_are_refused(llama, bad):
    with pytest.raises(BadInput, match="int64 token ids"):
        compress(llama, "wanda", {}, bad)


@pytest.mark.parametrize("shift", [300, -300])
def test_token_ids_the_model_does_not_know_are_refused(llama, tokens, shift):
    with pytest.raises(BadInput, match=r"ids from -?\d+ to -?\d+, the model knows 0 to 299.*Tokenise"):
        compress(llama, "wanda", {}, tokens + shift)
    compress(llama, "rtn", {"group_size": 32}, tokens + shift)  # looks at none


def test_windows_longer_than_the_learned_positions_are_refused(tokens):
    from transformers import OPTConfig, OPTForCausalLM

    shape = dict(vocab_size=300, hidden_size=64, ffn_dim=96, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=64)
    model = OPTForCausalLM(OPTConfig(**shape, max_position_embeddings=40)).eval()
    with pytest.raises(BadInput, match=r"seqlen: windows of 48 tokens, the model reads 40 at most\. Lower it to 40"):
        compress(model, "wanda", {}, tokens)
    assert compress(model, "wanda", {}, tokens[:, :40]).sparsity_reached == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("kind", ["Bloom", "GPTJ", "XGLM"])
@pytest.mark.parametrize("method", ["wanda", "gblm"])
def test_blocks_that_cannot_be_called_one_by_one_are_refused(tokens, kind, method):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=64, n_embd=64, d_model=64, ffn_dim=96, n_layer=1, num_layers=1, n_head=4, attention_heads=4,
        rotary_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    says = r"(returns tuple|positional arguments).*Supported: .*Llama"
    with pytest.raises(BadInput, match=says):
        compress(model, method, {}, tokens)
    assert re.search(says, incompatible(method, {}, config) or "")  # known without weights
    assert incompatible("magnitude", {}, config) is None


def test_other_weight_layouts_are_refused(tokens):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(BadInput, match=r"Supported: .*Llama"):
        compress(model, "rtn", {"group_size": 16})


def test_weights_shared_between_blocks_are_refused():
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(BadInput, match="tied"):
        decoder_blocks(model)
    model = make_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp  # it was quantised twice, the second time from its own codes
    with pytest.raises(BadInput, match="tied"):
        decoder_blocks(model)


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma2", "Phi3", "Mistral"])
def test_other_families_compress_and_every_input_scale_folds(kind, tokens):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, pad_token_id=0, sliding_window=16,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for method, params in [("gptq", {"bits": 8, "group_size": 32}), ("awq", {"bits": 8, "group_size": 32})]:
        done = compress(model, method, params, tokens)
        error = (done.model(tokens).logits - model(tokens).logits).norm() / model(tokens).logits.norm()
        assert error < 0.03, (method, error)
        assert all(s.input_scale is None for s in done.stored.values())


def test_layers_with_heads_of_different_widths_compress(tokens):
    """Gemma 4, whose configuration raises when it is asked for one width of all heads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gemma4_unified_text", vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=32, num_global_key_value_heads=1, pad_token_id=0, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    done = compress(model, "awq", {"bits": 8, "group_size": 32}, tokens)
    assert (done.model(tokens).logits - model(tokens).logits).norm() < 0.05 * model(tokens).logits.norm()
    assert len(done.stored) == 14 and all(s.input_scale is None for s in done.stored.values())


@pytest.mark.parametrize("depth", [2, 3], ids=["as-deep-as-the-text", "deeper"])
def test_of_a_model_with_eyes_the_language_model_is_compressed(tmp_path, tokens, depth):
    """Gemma 3 loads as a causal LM that lists the blocks of its vision tower first."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    torch.manual_seed(0)
    text = dict(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=16,
    )  # fmt: skip
    eyes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=depth, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=eyes, image_token_index=299, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for method, params in [("rtn", {"bits": 8, "group_size": 32}), ("awq", {"bits": 8, "group_size": 32}), ("gblm", {})]:
        assert incompatible(method, params, config) is None
        done = compress(model, method, params, tokens)
        assert len(done.stored) == 14 and all(name.startswith("model.language_model.layers.") for name in done.stored)
        for a, b in zip(done.model.model.vision_tower.parameters(), model.model.vision_tower.parameters(), strict=True):
            assert a is b
        error = (done.model(tokens).logits - model(tokens).logits).norm() / model(tokens).logits.norm()
        assert 0 < error < (0.03 if method != "gblm" else 1)
    done = compress(model, "rtn", {"bits": 4, "group_size": 32})
    back = AutoModelForCausalLM.from_pretrained(export(done, None, tmp_path / "out").path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(back(tokens).logits, done.model(tokens).logits, rtol=0, atol=1e-5)


def test_groups_are_found_by_what_reads_the_same_input(llama, tokens):
    copy = clone(llama)
    _, blocks = decoder_blocks(copy)
    groups = discover(copy, blocks, tokens[:1, :8], folds=True).of(blocks[0])
    assert [[n.split(".")[-1] for n in g.linears] for g in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert [(g.fold.producer, g.fold.kind, g.fold.repeat) for g in groups] == [
        ("input_layernorm", "norm", 1),
        ("self_attn.v_proj", "linear", 2),
        ("post_attention_layernorm", "norm", 1),
        ("mlp.up_proj", "linear", 1),
    ]
