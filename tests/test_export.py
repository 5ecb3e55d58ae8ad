"""Exported checkpoints give the logits of the cell in memory, in a fresh process; artefacts come back bit for bit."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comptrust.actors import models
from comptrust.actors.cell import Cell
from comptrust.actors.compress import check, compress
from comptrust.actors.compress.artifacts import ArtifactCache, dump, restore
from comptrust.actors.compress.export import FORMATS, PACKED, _pack_awq, card, check_format, export, load_packed
from comptrust.actors.compress.reading import read_checkpoint
from comptrust.actors.errors import BadInput
from comptrust.kernels.formats import unpack
from safetensors.torch import load_file, save
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

TOKENS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
#: What a fresh process does with each (folder, dtype): load with plain transformers, run once, save logits.
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
for pair in sys.argv[1:]:
    folder, dtype = pair.rsplit(":", 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        torch.save(model(tokens).logits.float(), folder + ".logits")
"""
#: name -> (method, parameters, dtype, format that `auto` chooses)
CASES = {
    "int4": ("rtn", {"bits": 4, "group_size": 32}, "float32", "compressed-tensors"),
    "int4-asymmetric": ("rtn", {"bits": 4, "group_size": 32, "symmetric": False}, "float32", "compressed-tensors"),
    "int3-asymmetric": ("rtn", {"bits": 3, "group_size": 32, "symmetric": False}, "float32", "compressed-tensors"),
    "int8-skip": ("gptq", {"bits": 8, "group_size": None, "skip": ["*.1.mlp.*"]}, "float32", "compressed-tensors"),
    "mixed-bits": (
        "gptq",
        {"bits": 4, "group_size": 32, "overrides": {"*.down_proj": {"bits": 8}}},
        "float32",
        "compressed-tensors",
    ),
    "int4-bfloat16": ("rtn", {"bits": 4, "group_size": 32}, "bfloat16", "compressed-tensors"),
    "int8-bfloat16": ("gptq", {"bits": 8, "group_size": None}, "bfloat16", "compressed-tensors"),
    "int8-float16": ("gptq", {"bits": 8, "group_size": None}, "float16", "compressed-tensors"),
    "int4-asymmetric-float16": ("rtn", {"bits": 4, "group_size": 32, "symmetric": False}, "float16", "compressed-tensors"),
    "w8a8": ("smoothquant", {}, "float32", "compressed-tensors"),
    "awq": ("awq", {"bits": 4, "group_size": 32}, "float32", None),
    "2:4": ("wanda", {"pattern": "2:4"}, "float32", "dense"),
    "2:4+int4": ("sparsegpt", {"pattern": "2:4", "bits": 4, "group_size": 32}, "float32", "compressed-tensors"),
    "2:4-bfloat16": ("wanda", {"pattern": "2:4"}, "bfloat16", "dense"),
    "nf4": ("nf4", {}, "float32", "bitsandbytes"),
    "nf4-bfloat16": ("nf4", {}, "bfloat16", "bitsandbytes"),
    "int8-bitsandbytes-float16": ("llm_int8", {}, "float16", "bitsandbytes"),
    "nf4-double": ("nf4", {"double_quant": True}, "float32", "bitsandbytes"),
    "fp4": ("fp4", {}, "float32", "bitsandbytes"),
    "int8-bitsandbytes": ("llm_int8", {}, "float32", "bitsandbytes"),
    "dense": ("dense", {}, "float32", "dense"),
    "dense-untied": ("dense", {}, "float32", "dense"),
}


def tiny(dtype=torch.float32, tied=True):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():  # as it is loaded: rotary frequencies stay float32, which `to` would round
        p.data = p.data.to(dtype)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits.float()


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Every case exported here and loaded by one fresh process: (in memory, format, logits before, logits after)."""
    root, made = tmp_path_factory.mktemp("reload"), {}
    for name, (method, params, dtype, _) in CASES.items():
        compressed = compress(tiny(getattr(torch, dtype), tied=name != "dense-untied"), method, params, TOKENS)
        folder = root / name.replace(":", "-")
        done = export(compressed, None, folder)
        made[name] = (done.format, logits(compressed.model), folder, dtype)
    pairs = [f"{folder}:{dtype}" for _, _, folder, dtype in made.values()]
    run = subprocess.run([sys.executable, "-c", RELOAD, *pairs], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {
        n: (form, before, torch.load(f"{folder}.logits", weights_only=True)) for n, (form, before, folder, _) in made.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_gives_the_same_logits(reloaded, name):
    format, before, after = reloaded[name]
    assert format == CASES[name][3] or CASES[name][3] is None
    if name == "w8a8":  # the int8 scale of a token is max / 127 here and max / 127.5 in compressed-tensors
        torch.testing.assert_close(after, before, rtol=0, atol=2e-2)
    elif (
        CASES[name][2] == "bfloat16" and format == "compressed-tensors"
    ):  # readers round the scale and its product with the code, we the product alone
        assert float((after - before).norm() / before.norm()) < 1e-2
    else:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


MORE = {
    "act-order": ("gptq", {"order": "act", "group_size": 32}),
    "by channel": ("gptq", {"order": "act", "group_size": None}),
    "act-order in one block": ("gptq", {"group_size": 32, "overrides": {"*.1.*": {"order": "act"}}}),
    "asymmetric in one block": ("rtn", {"group_size": 32, "overrides": {"*.1.*": {"symmetric": False}}}),
    "an override that changes nothing": ("rtn", {"group_size": 32, "overrides": {"*.1.*": {"bits": 4}}}),
    "codes in one block": ("sparsegpt", {"pattern": "2:4", "overrides": {"*.1.*": {"bits": 4, "group_size": 32, "refit": 0}}}),
}
ODD = {
    "32 codes a word": ("rtn", {"bits": 3, "group_size": 8}),
    "16 codes a word": ("rtn", {"bits": 2, "group_size": 8}),
    "8 outputs a word": ("rtn", {"bits": 4, "group_size": None}),
    "4 codes a word": ("rtn", {"bits": 8, "group_size": None}),
}


def odd():
    torch.manual_seed(1)
    sizes = {"vocab_size": 256, "hidden_size": 40, "intermediate_size": 88, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1, head_dim=10)).eval()


@pytest.mark.parametrize("name", [n for n in CASES | MORE | ODD if n != "awq" and "16" not in n.partition("-")[2]])
def test_what_a_format_can_hold_is_known_before_the_work(model, tmp_path, name):
    method, params = (CASES | MORE | ODD)[name][:2]
    model = odd() if name in ODD else model
    compressed, possible = compress(model, method, params, TOKENS), set()
    for format in FORMATS:
        try:
            check_format(format, method, check(method, params, where=method), model.config)
        except BadInput as error:
            with pytest.raises(BadInput, match=r"^--format: ") as late:
                export(compressed, None, tmp_path / format, format=format)
            assert late.value.problem in error.problem
        else:
            possible.add(export(compressed, None, tmp_path / format, format=format).format)
    assert export(compressed, None, tmp_path / "auto").format in possible


def _unpack_gptq(t, name, bits, old):
    """The layout read with numpy alone, from its description in AutoGPTQ."""
    mask = 2**bits - 1
    shifts = np.arange(0, 32, bits)
    words = t[f"{name}.qweight"].numpy().view(np.uint32).astype(np.int64)
    codes = ((words[:, None, :] >> shifts[None, :, None]) & mask).reshape(-1, words.shape[1])
    zeros = t[f"{name}.qzeros"].numpy().view(np.uint32).astype(np.int64)
    zeros = ((zeros[:, :, None] >> shifts) & mask).reshape(zeros.shape[0], -1) + int(old)
    scales, index = t[f"{name}.scales"].float().numpy(), t[f"{name}.g_idx"].numpy()
    return torch.from_numpy(((codes - zeros[index]) * scales[index]).T.astype(np.float32))


def _unpack_awq(t, name, group):
    order = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])

    def read(key):
        words = t[f"{name}.{key}"].numpy().view(np.uint32).astype(np.int64)
        return ((words[:, :, None] >> np.arange(0, 32, 4)) & 15)[:, :, order].reshape(words.shape[0], -1)

    codes, zeros = read("qweight"), read("qzeros")
    index = np.arange(codes.shape[0]) // group
    return torch.from_numpy(((codes - zeros[index]) * t[f"{name}.scales"].float().numpy()[index]).T.astype(np.float32))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "order"), [(4, "none"), (8, "group-aware"), (4, "act")])
def test_gptq_layout_holds_the_weights(model, tmp_path, bits, order, symmetric):
    params = {"bits": bits, "group_size": 32, "symmetric": symmetric, "order": order}
    compressed = compress(model, "gptq", params, TOKENS)
    done = export(compressed, None, tmp_path / "out", format="auto" if order == "act" else "gptq")
    assert done.format == "gptq"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] == (order == "act") and config["bits"] == bits
    for name in compressed.stored:
        W = _unpack_gptq(tensors, name, bits, config["checkpoint_format"] == "gptq")
        assert torch.equal(W, compressed.model.get_submodule(name).weight)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"skip": ["*.1.mlp.*"]}, "no place for dense layers"),
        ({"overrides": {"*.down_proj": {"bits": 8}}}, "one width and group size"),
        ({"overrides": {"*.down_proj": {"order": "none", "group_size": 64}}}, "one width and group size"),
    ],
)
def test_act_order_that_gptqs_layout_cannot_hold_is_written_dense(model, tmp_path, more, why):
    compressed = compress(model, "gptq", {"bits": 4, "group_size": 32, "order": "act"} | more, TOKENS)
    done = export(compressed, None, tmp_path / "out")
    assert done.format == "dense" and why in done.notes[0]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name in compressed.stored:
        assert torch.equal(tensors[f"{name}.weight"], compressed.model.get_submodule(name).weight)
    with pytest.raises(BadInput, match=f"{why}.* Use auto"):
        export(compressed, None, tmp_path / "gptq", format="gptq")


@pytest.mark.parametrize(("symmetric", "group"), [(True, 32), (False, 32), (False, None)])
def test_awq_layout_holds_the_weights(model, tmp_path, symmetric, group):
    compressed = compress(model, "rtn", {"bits": 4, "group_size": group, "symmetric": symmetric})
    export(compressed, None, tmp_path / "out", format="awq")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["group_size"]
    for name, s in compressed.stored.items():
        unpacked = _unpack_awq(tensors, name, s.shape[1] if stated == -1 else stated)
        assert torch.equal(unpacked, compressed.model.get_submodule(name).weight)


def test_zero_points_that_compressed_tensors_cannot_read_are_written_dense(tmp_path):
    """Groups of so few outputs that their zero points fill one row of words, as in Doge's dt_proj."""
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1, head_dim=8)).eval()
    for group, symmetric, format in ((8, False, "dense"), (None, False, "compressed-tensors"), (8, True, "compressed-tensors")):
        params = {"group_size": group, "symmetric": symmetric}
        compressed, folder = compress(model, "rtn", params), tmp_path / f"{group}-{symmetric}"
        assert export(compressed, None, folder).format == format
        again = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torch.testing.assert_close(logits(again), logits(compressed.model), rtol=0, atol=1e-5)
    with pytest.raises(BadInput, match="k_proj has 8"):
        check_format("compressed-tensors", "rtn", {"group_size": 8, "symmetric": False}, model.config)


def test_awq_codes_are_packed_where_they_lie():
    assert _pack_awq(torch.zeros(4, 16, dtype=torch.int64, device="meta")).shape == (4, 2)


def test_pruned_layers_lie_packed_beside_the_dense_ones(model, tmp_path):
    both = {"pattern": "2:4", "bits": 4, "group_size": 32}
    for method, params in (("magnitude", {"pattern": "2:4"}), ("wanda", {"sparsity": 0.6}), ("sparsegpt", both)):
        compressed = compress(model, method, params, TOKENS)
        done = export(compressed, None, tmp_path / method)
        # vLLM reads every *.safetensors beside the weights (model_loader/weight_utils.py), and knows no other names.
        assert [p.name for p in done.path.glob("*.safetensors")] == ["model.safetensors"]
        packed = load_packed(done.path / PACKED)
        assert packed.keys() == compressed.stored.keys()
        for name, layer in packed.items():
            assert layer.format == {"magnitude": "2:4", "wanda": "bitmap", "sparsegpt": "2:4+int4"}[method]
            assert torch.equal(unpack(layer), compressed.model.get_submodule(name).weight)
        assert (done.path / PACKED).stat().st_mode & 0o777 == 0o644
        assert (done.path / PACKED).stat().st_size < 0.8 * sum(4 * s.shape[0] * s.shape[1] for s in compressed.stored.values())


def test_the_card_names_the_cell_and_what_was_measured(model, tmp_path):
    cell = Cell(
        model="org/name@main", revision="c0ffee" * 6 + "c0ff", method="rtn", params={"bits": 4}, calibration_digest="d1735",
        evaluation="e",
    )  # fmt: skip
    compressed = compress(model, "rtn", {"bits": 4, "group_size": 32})
    done = export(
        compressed, None, tmp_path / "out", cell=cell, measured={"perplexity": 12.345678, "trust": 61.0, "mmlu": None}
    )
    assert {p.stat().st_mode & 0o777 for p in done.path.iterdir()} == {0o644}
    text = (done.path / "README.md").read_text()
    for part in ("base_model: org/name", cell.artifact_key, cell.key, "d1735", "| perplexity | 12.35 |", "| trust | 61 |"):
        assert part in text
    assert "mmlu" not in text


def test_globs_on_the_card_keep_their_stars(model):
    """Between two of them Markdown saw italics."""
    from markdown_it import MarkdownIt

    params = check("rtn", {"group_size": 32, "skip": ["*.0.mlp.*"], "overrides": {"*.self_attn.*": {"bits": 8}}})
    cell = Cell(model="org/name", revision="r", method="rtn", params=params)
    measured = {"params": json.dumps(dict(params))}
    page = MarkdownIt().enable("table").render(card(compress(model, "rtn", params), "dense", [], cell, measured))
    assert page.count("*.0.mlp.*") == page.count("*.self_attn.*") == 2


def test_generation_settings_that_transformers_would_not_save_are_kept(tmp_path):
    """Vicuna's: a temperature without sampling. They load with a warning, and saving raised after all the work."""
    model = tiny()
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6)
    out = export(compress(model, "rtn", {"group_size": 32}), None, tmp_path / "out").path
    models.save_weights(model, tmp_path)
    for folder in (out, tmp_path):
        kept = GenerationConfig.from_pretrained(folder)
        assert (kept.temperature, kept.top_p) == (0.9, 0.6)


def test_code_beside_the_original_is_not_asked_for(model, tmp_path):
    """Phi-3's ``auto_map``: with ``trust_remote_code=True`` the checkpoint could not be loaded, for that code is not in it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    model.save_pretrained(tmp_path / "model")
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b").save_pretrained(tmp_path / "model")
    for name, kind in (("config", "AutoConfig"), ("tokenizer_config", "AutoTokenizer")):
        file = tmp_path / "model" / f"{name}.json"
        own = ["own.Own", None] if kind == "AutoTokenizer" else "own.Own"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {kind: own}}))
    read, tokenizer = models.load(models.resolve(str(tmp_path / "model")))
    out = export(compress(read, "rtn", {"group_size": 32}), tokenizer, tmp_path / "out").path
    assert AutoConfig.from_pretrained(out, trust_remote_code=True).model_type == "llama"
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True)("b").input_ids == [1]


def test_a_model_with_eyes_says_what_is_missing(tmp_path):
    """AutoProcessor and vLLM want the file, and the folder of such a model is without."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 256, "num_key_value_heads": 1, "head_dim": 16}
    config = Gemma3Config(text_config=text, vision_config=sizes | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4)
    for made, said in ((AutoModelForCausalLM.from_config(config), True), (tiny(), False)):
        done = export(compress(made, "dense", {}), None, tmp_path / str(said))
        assert any("preprocessor_config.json" in note for note in done.notes) == said
        assert "of the compressed layers" not in (done.path / "README.md").read_text()  # there are none


def test_only_a_hub_id_is_named_as_the_base_model(model, tmp_path):
    (tmp_path / "org").mkdir()
    model.save_pretrained(tmp_path / "org" / "name")
    digest = models.resolve(str(tmp_path / "org" / "name")).revision
    compressed = compress(model, "dense", {})
    for revision, named in ((digest, False), ("c0ffee" * 6 + "c0ff", True)):
        cell = Cell(model="org/name", revision=revision, method="dense")
        assert ("base_model" in card(compressed, "dense", [], cell, None)) == named


def test_a_model_that_was_quantised_before_is_not_written_again(model, tmp_path):
    """As dense weights its int8 codes loaded without a word, with other logits altogether."""
    for symmetric, folder in ((True, tmp_path / "codes"), (False, tmp_path / "dequantised")):
        export(compress(model, "rtn", {"group_size": 32, "symmetric": symmetric}), None, folder)
        read = LlamaForCausalLM.from_pretrained(folder)
        if symmetric:
            with pytest.raises(BadInput, match=r"quantised before \(compressed-tensors\).* Copy its own checkpoint"):
                export(compress(read, "dense", {}), None, tmp_path / "again")
        else:  # it loads as dense weights
            out = export(compress(read, "dense", {}), None, tmp_path / "again").path
            assert torch.equal(logits(LlamaForCausalLM.from_pretrained(out)), logits(read))


@pytest.mark.parametrize(
    ("method", "params"), [("rtn", {"group_size": 32}), ("smoothquant", {}), ("llm_int8", {}), ("nf4", {})]
)
def test_a_checkpoint_counts_as_the_cell_it_was_exported_from(tmp_path, method, params):
    """As a dense cell of its own it had an eighth of its weights, of 19 bits, and lacked bitsandbytes' scales."""
    made = compress(tiny(torch.float16), method, params, TOKENS)
    export(made, None, tmp_path / "out")
    read = compress(LlamaForCausalLM.from_pretrained(tmp_path / "out"), "dense", {})
    assert read.parameters == made.parameters
    assert 0 <= read.size_bytes - made.size_bytes <= 100 * len(made.stored)  # shapes and names of data types
    assert read.bits_per_weight == pytest.approx(8 * made.size_bytes / made.parameters, rel=0.02)


def test_what_no_format_holds_is_refused_before_anything_is_written(model, tmp_path):
    act = compress(model, "gptq", {"bits": 4, "group_size": 32, "order": "act"}, TOKENS)
    three = compress(model, "rtn", {"bits": 3, "group_size": 32})
    pruned = compress(model, "magnitude", {"sparsity": 0.5})
    for compressed, format, what in (
        (act, "compressed-tensors", "act-order"),
        (act, "awq", "act-order"),
        (three, "awq", "4-bit"),
        (pruned, "gptq", "integer codes"),
        (pruned, "bitsandbytes", "bitsandbytes"),
        (pruned, "onnx", "unknown format"),
    ):
        with pytest.raises(BadInput, match=what):
            export(compressed, None, tmp_path / "out", format=format)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="not an empty directory"):
        export(pruned, None, tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("rtn", {"bits": 3, "group_size": 32, "symmetric": False}),
        ("gptq", {"bits": 4, "group_size": 32, "order": "act"}),
        ("sparsegpt", {"pattern": "2:4"}),
    ],
)
def test_a_cached_artefact_is_the_same_bit_for_bit(model, tmp_path, method, params):
    made = compress(model, method, params, TOKENS)
    cache = ArtifactCache(tmp_path, 10**8)
    assert cache.get("k") is None
    assert cache.put("k", *dump(made, model))
    back = restore(model, *cache.get("k"))
    assert torch.equal(logits(back.model), logits(made.model))
    assert (back.layers, back.size_bytes, back.bits_per_weight, back.sparsity_reached, back.parameters, back.seconds) == (
        made.layers, made.size_bytes, made.bits_per_weight, made.sparsity_reached, made.parameters, made.seconds,
    )  # fmt: skip
    for name, s in made.stored.items():
        assert back.stored[name].shape == s.shape and back.stored[name].format == s.format
        for part in ("codes", "scale", "zero", "group_index"):
            ours, theirs = getattr(s, part), getattr(back.stored[name], part)
            assert theirs is None if ours is None else torch.equal(ours, theirs)
    assert back.model.model.embed_tokens.weight is model.model.embed_tokens.weight
    if method == "rtn":  # 3-bit codes in a byte each, not four bytes of weights
        assert sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) < made.parameters * 1.5


def test_replaced_modules_are_not_cached(model):
    assert dump(compress(model, "nf4", {}), model) is None


def test_the_least_recently_used_artefact_goes_first(tmp_path):
    cache = ArtifactCache(tmp_path, 4000)
    block = {"t": torch.zeros(256)}  # 1 KiB and a header
    for key in "abc":
        assert cache.put(key, block, {})
    assert cache.get("a") is not None
    assert cache.put("d", block, {"n": 1}) and cache.get("d")[1] == {"n": 1}
    assert [cache.get(k) is not None for k in "abcd"] == [True, False, True, True]
    assert not cache.put("huge", {"t": torch.zeros(2000)}, {})
    assert sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) <= 4000


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:150],
        lambda whole: whole + b"x",
        lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],  # one bit of one weight
        lambda whole: save({"t": torch.zeros(100)}),  # no header of ours
    ],
)
def test_a_damaged_artefact_counts_as_absent(tmp_path, damage):
    cache = ArtifactCache(tmp_path, 10**6)
    for dtype in (torch.bfloat16, torch.int8, torch.float32):
        cache.put("k", {"t": torch.ones(100, dtype=dtype), "s": torch.tensor(1.0), "e": torch.zeros(0, 3)}, {})
        assert cache.get("k")[0]["t"].dtype == dtype
    path = tmp_path / "k.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("k") is None and not path.exists()


FULL = """
import resource, sys, torch
from comptrust.actors.compress.artifacts import ArtifactCache
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    ArtifactCache(sys.argv[1], 10**6).put("k", {"t": torch.zeros(1000)}, {})
except OSError as error:
    print(error)
"""


TERMINATED = """
import os, signal, sys
import comptrust.actors.compress.export as exports
from comptrust.actors.compress import compress
from comptrust.sweep import cli
sys.path.insert(0, sys.argv[2])
from test_export import tiny

def ended(*args):
    write(*args)
    os.kill(os.getpid(), signal.SIGTERM)

write, exports._save = exports._save, ended
cli.app = lambda **_: exports.export(compress(tiny(), "rtn", {"group_size": 32}), None, sys.argv[1])
cli.main()
"""


def test_a_command_that_is_told_to_end_leaves_no_half_checkpoint(tmp_path):
    """As large as the model, in a hidden folder that nothing removed."""
    run = subprocess.run([sys.executable, "-c", TERMINATED, str(tmp_path / "out"), str(Path(__file__).parent)])
    assert run.returncode == 143 and not list(tmp_path.iterdir())


def test_a_full_disk_is_an_os_error(tmp_path):
    """safetensors has an error of its own for it, by which a full cache failed the cell and `export` ended in a traceback."""
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "cache")], capture_output=True, text=True)
    assert "File too large" in run.stdout, run.stderr
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]
    tiny().save_pretrained(tmp_path / "model")
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}'
    )
    small = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); from comptrust.sweep.cli import main; main()"
    )
    arguments = ["compress", str(tmp_path / "model"), "--method", "rtn", "--group-size", "32", "-o", str(tmp_path / "out")]
    run = subprocess.run([sys.executable, "-c", small, *arguments], capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "failed: SafetensorError: Error while serializing: I/O error: File too large" in run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "model"]


def _hammer(root, worker):
    cache = ArtifactCache(root, 20_000)
    for i in range(20):
        key = f"k{(worker + i) % 5}"
        found = cache.get(key)
        assert found is None or bool((found[0]["t"] == found[1]["value"]).all())
        cache.put(key, {"t": torch.full((1000,), float(worker))}, {"value": worker})


def test_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_hammer, args=(tmp_path, w)) for w in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert [w.exitcode for w in workers] == [0] * 4
    assert sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) <= 20_000
    assert not [p for p in tmp_path.glob(".*") if p.name != ".lock"]


def neox(kind, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).eval()


def test_weights_have_the_names_that_other_readers_know(tmp_path):
    """transformers 5 calls the head of GPT-NeoX ``lm_head``; all that came before it, and the checkpoints on the hub, ``embed_out``."""
    from transformers import AutoModelForCausalLM

    compressed = compress(neox("gpt_neox"), "gptq", {"bits": 4, "group_size": 32}, TOKENS)
    for format in ("dense", "gptq"):
        folder = export(compressed, None, tmp_path / format, format=format).path
        names = set(load_file(folder / "model.safetensors"))
        assert "embed_out.weight" in names and "lm_head.weight" not in names
        packed = format == "gptq"
        again = read_checkpoint(folder, compressed.model).model if packed else AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(again), logits(compressed.model))


def plain(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


@pytest.mark.parametrize("kind", ["falcon", "gpt_bigcode", "nanochat"])
def test_architectures_that_ask_every_linear_for_a_weight_are_dequantised_on_load(tmp_path, kind):
    """Their checkpoints could not be loaded by transformers at all."""
    from transformers import AutoModelForCausalLM

    compressed = compress(plain(kind), "rtn", {"bits": 4, "group_size": 32})
    done = export(compressed, None, tmp_path / "out")
    assert done.format == "compressed-tensors"
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(done.path)), logits(compressed.model), rtol=0, atol=1e-5
    )


def test_falcons_own_linears_are_not_written_as_bitsandbytes(tmp_path):
    """transformers could not load them: it puts bitsandbytes' modules in the place of ``nn.Linear`` alone."""
    model = plain("falcon")
    for format in ("auto", "bitsandbytes"):
        with pytest.raises(BadInput, match=r"bitsandbytes cannot hold this cell of nf4: .*Falcon has its own. Take another"):
            check_format(format, "nf4", check("nf4", {}), model.config)
    with pytest.raises(BadInput, match="Falcon has its own"):
        export(compress(model, "nf4", {}), None, tmp_path / "out")


def test_gptqs_layout_leaves_the_head_whatever_it_is_called(tmp_path):
    model = neox("gpt_neox_japanese", intermediate_multiple_size=2, tie_word_embeddings=False)
    folder = export(compress(model, "rtn", {"bits": 4, "group_size": 32}), None, tmp_path / "out", format="gptq").path
    assert torch.equal(load_file(folder / "model.safetensors")["embed_out.weight"], model.embed_out.weight)
