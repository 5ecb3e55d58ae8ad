"""Other libraries as backends: parameters, pins and reading are tested everywhere, the libraries where they are installed."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from comptrust.actors import models
from comptrust.actors.calibration import CalibrationConfig, calibrate
from comptrust.actors.compress import backends, compress
from comptrust.actors.compress.backends import (
    BACKENDS,
    check,
    check_drift,
    environment,
    incompatible,
    list_backends,
    run_backend,
)
from comptrust.actors.compress.export import export
from comptrust.actors.compress.reading import read_checkpoint
from comptrust.actors.errors import BadInput, CellError

sys.path.insert(0, str(Path(__file__).parent))
from tiny import make_tiny_model

PINS = Path(backends.__file__).parents[2] / "conf" / "backends"


@pytest.fixture(scope="module")
def ref(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", hidden=128)
    # A temperature without sampling, as Vicuna has it, loads and cannot be saved by save_pretrained.
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    return models.resolve(str(folder))


@pytest.fixture(scope="module")
def loaded(ref):
    return models.load(ref)


@pytest.fixture(scope="module")
def dense(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def tokens(loaded):
    return calibrate(CalibrationConfig(samples=4, seqlen=64), loaded[1]).tokens


# --- without any environment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_pins_are_exact_and_torch_comes_first(name):
    first, rest = (PINS / f"{name}.txt").read_text().split("\n\n")
    lines = [line for line in (first + "\n" + rest).splitlines() if not line.startswith("#")]
    assert all(len(line.split("==")) == 2 and "+" not in line for line in lines)
    assert len({line.split("==")[0].lower() for line in lines}) == len(lines)
    assert next(line for line in first.splitlines() if not line.startswith("#")) == "torch==2.13.0"
    assert any(line.startswith("ray==") for line in rest.splitlines())


@pytest.mark.parametrize(
    ("format", "params"),
    [
        ("gptq", {"bits": 4, "group_size": 64}),
        ("gptq", {"bits": 3, "group_size": 64, "symmetric": False}),
        ("gptq", {"bits": 8, "group_size": None}),
        ("awq", {"bits": 4, "group_size": 64, "symmetric": False}),
        ("compressed-tensors", {"bits": 4, "group_size": 64, "symmetric": False}),
        ("compressed-tensors", {"bits": 8, "group_size": None}),
        ("compressed-tensors", {"bits": 3, "group_size": 32}),
    ],
)
def test_what_export_writes_is_read_back_bit_for_bit(dense, tmp_path, format, params):
    made = compress(dense, "rtn", params)
    back = read_checkpoint(export(made, None, tmp_path / "out", format=format).path, dense)
    for name, s in made.stored.items():
        assert torch.equal(back.model.get_submodule(name).weight, made.model.get_submodule(name).weight)
        r = back.stored[name]
        assert (r.bits, r.group_size, r.symmetric, r.group_index) == (s.bits, s.group_size, s.symmetric, None)
    assert back.parameters == made.parameters
    # Scales of compressed-tensors are float32 in a float32 model, ours are counted as float16; everything else is counted alike.
    wider = sum(2 * s.scale.numel() for s in made.stored.values()) if format == "compressed-tensors" else 0
    assert back.size_bytes == made.size_bytes + wider


@pytest.mark.parametrize("params", [{}, {"symmetric": False}, {"order": "act"}])
def test_a_fused_layer_that_was_taken_apart_is_read_back(tmp_path, params):
    """GPTQModel writes Phi-3's gate_up_proj as gate_proj and up_proj."""
    from safetensors.torch import load_file, save_file
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    phi = Phi3ForCausalLM(config).eval()
    made = compress(phi, "gptq", {"bits": 4, "group_size": 32} | params, torch.randint(0, 256, (8, 32)))
    file = export(made, None, tmp_path / "out", format="gptq").path / "model.safetensors"
    apart = {}
    for name, t in load_file(file).items():
        cut = dict(zip(("gate_proj", "up_proj"), (t, t) if t.ndim == 1 else t.chunk(2, dim=1), strict=True))
        apart |= {name.replace("gate_up_proj", k): v.clone() for k, v in cut.items()} if "gate_up_proj" in name else {name: t}
    save_file(apart, file, metadata={"format": "pt"})
    back = read_checkpoint(file.parent, phi)
    assert list(back.stored) == list(made.stored) and back.size_bytes == made.size_bytes
    for name in made.stored:
        assert torch.equal(back.model.get_submodule(name).weight, made.model.get_submodule(name).weight)


def test_act_order_is_read_back(dense, tokens, tmp_path):
    made = compress(dense, "gptq", {"bits": 4, "group_size": 64, "order": "act"}, tokens)
    back = read_checkpoint(export(made, None, tmp_path / "out").path, dense)
    for name, s in made.stored.items():
        assert torch.equal(back.model.get_submodule(name).weight, made.model.get_submodule(name).weight)
        assert torch.equal(back.stored[name].group_index, s.group_index)


def test_a_pruned_checkpoint_is_read_back_and_counted(dense, tmp_path):
    made = compress(dense, "magnitude", {"pattern": "2:4"})
    back = read_checkpoint(export(made, None, tmp_path / "out").path, dense, pattern="2:4")
    assert back.sparsity_reached == made.sparsity_reached == 0.5
    assert back.size_bytes == made.size_bytes


def test_a_checkpoint_with_a_dense_layer_left_is_no_result(dense, tmp_path):
    made = compress(dense, "rtn", {"bits": 8, "group_size": None, "skip": ["*.1.mlp.up_proj"]})
    with pytest.raises(CellError, match=r"1 layers were not compressed, model\.layers\.1\.mlp\.up_proj"):
        read_checkpoint(export(made, None, tmp_path / "out").path, dense)


def test_parameters_are_the_backends_own():
    assert check("auto-gptq", "gptq", {"bits": 3}) == {
        "bits": 3, "group_size": 128, "symmetric": True, "order": "none", "damping": 0.01,
    }  # fmt: skip
    assert check("gptqmodel", "gptq", {})["order"] == "group-aware"
    for name, method, params, says in (
        ("awq", "awq", {}, "unknown backend"),
        ("autoawq", "gptq", {}, "no method 'gptq'.*It has: awq"),
        ("autoawq", "awq", {"bits": 3}, "methods.2..bits: 3"),
        ("auto-gptq", "gptq", {"token_clip": 8}, "no parameter 'token_clip'.*It takes: bits, group_size"),
        ("auto-gptq", "gptq", {"skip": ["*.0.*"]}, r"methods.2..skip: auto-gptq does not take skip, which is .*0"),
        ("llmcompressor", "wanda", {"overrides": {"*": {"sparsity": 0.1}}}, "methods.2..overrides: .* does not take overrides"),
    ):
        with pytest.raises(BadInput, match=says):
            check(name, method, params, where="methods[2]")


def test_impossible_combinations_are_known_without_weights(dense):
    assert "does not divide" in incompatible("autoawq", "awq", {"group_size": 96}, dense.config)
    assert incompatible("autoawq", "awq", {"group_size": 64}, dense.config) is None
    assert "group size" in incompatible("autoawq", "awq", {"group_size": None}, dense.config)
    assert "neither skip" in incompatible("llmcompressor", "wanda", {"skip": ["*"]}, dense.config)
    assert "pattern 2:4 means" in incompatible("llmcompressor", "wanda", {"pattern": "2:4", "sparsity": 0.3}, dense.config)


def test_a_backend_that_is_not_installed_is_named_with_its_command(ref, dense, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPTRUST_CACHE", str(tmp_path))
    assert [(r["name"], r["installed"], r["problem"]) for r in list_backends()] == [
        (n, False, "not installed") for n in (*BACKENDS, "vllm")
    ]
    with pytest.raises(BadInput, match="comptrust backends install autoawq"):
        run_backend("autoawq", "awq", {"group_size": 64}, ref=ref, dense=dense, tokens=tokens)
    environment("autoawq").mkdir(parents=True)
    (environment("autoawq") / "comptrust.json").write_text(json.dumps({"pins": "of last year"}))
    assert list_backends()[0]["problem"] == "installed from other pins"
    with pytest.raises(BadInput, match="unknown backend 'bnb'"):
        backends.install("bnb")


def test_noise_is_refused(dense, tokens):
    four = compress(dense, "rtn", {"bits": 4, "group_size": 64})
    assert 0 < check_drift("x", four, dense, tokens) < 0.5
    with torch.no_grad():
        for layer in four.model.model.layers:
            layer.mlp.up_proj.weight.mul_(30)
            layer.mlp.down_proj.weight.copy_(torch.randn_like(layer.mlp.down_proj.weight))
    with pytest.raises(CellError, match="noise, not compression"):
        check_drift("x", four, dense, tokens)
    four.model.lm_head = torch.nn.Linear(128, dense.config.vocab_size)
    torch.nn.init.constant_(four.model.lm_head.weight, torch.nan)
    with pytest.raises(CellError):
        check_drift("x", four, dense, tokens, None)


@pytest.mark.parametrize(("ours", "theirs"), [("1:4", "3:4"), ("2:4", "2:4"), ("3:4", "1:4"), ("unstructured", "0:0")])
def test_llmcompressor_counts_what_it_prunes(ours, theirs):
    assert runpy.run_path(str(PINS / "llmcompressor.py"))["pruned"](ours) == theirs


def test_autoawq_sees_that_its_copies_are_none(monkeypatch):
    runner = runpy.run_path(str(PINS / "autoawq.py"))
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.cpu)  # put back afterwards
    with pytest.raises(SystemExit, match="refused"):
        runner["refuse_aliases"](torch)
    runner["copy_on_cpu"](torch)
    runner["refuse_aliases"](torch)


# --- with the environments ---------------------------------------------------------------------------------------------------


def installed(name):
    problem = next(r["problem"] for r in list_backends() if r["name"] == name)
    if problem:
        pytest.skip(f"backend {name}: {problem} (comptrust backends install {name})")


def through(dense, name, method, params, tokens, ref, **more):
    made = run_backend(name, method, params, ref=ref, dense=dense, tokens=tokens, **more)
    assert len(made.stored) == 14  # seven linears in each of two layers
    return made


@pytest.mark.backends
@pytest.mark.parametrize(
    ("name", "method", "params", "drift"),
    [
        ("autoawq", "awq", {"group_size": 64}, 0.25),
        ("auto-gptq", "gptq", {"group_size": 64}, 0.25),
        ("auto-gptq", "gptq", {"group_size": 64, "order": "act", "symmetric": False}, 0.25),
        ("gptqmodel", "gptq", {"group_size": 64}, 0.25),
        ("llmcompressor", "rtn", {"group_size": 64}, 0.25),
        ("llmcompressor", "gptq", {"group_size": 64}, 0.25),
        ("llmcompressor", "awq", {"group_size": 64}, 0.25),
        ("llmcompressor", "sparsegpt", {"pattern": "2:4"}, 0.6),
        ("llmcompressor", "wanda", {"sparsity": 0.5}, 0.6),
        ("llmcompressor", "sparsegpt", {"pattern": "3:4"}, 0.4),
        ("llmcompressor", "wanda", {"pattern": "3:4"}, 0.4),
    ],
)
def test_a_tiny_model_goes_through(ref, dense, tokens, name, method, params, drift):
    installed(name)
    steps = []
    made = through(dense, name, method, params, tokens, ref, via="subprocess", progress=lambda *call: steps.append(call))
    assert 0 < check_drift(name, made, dense, tokens, None) < drift
    if "pattern" in params or "sparsity" in params:
        assert made.sparsity_reached == pytest.approx(0.25 if params.get("pattern") == "3:4" else 0.5, abs=0.01)
    else:
        assert 4 < made.bits_per_weight < 5


@pytest.mark.backends
def test_as_a_ray_task_in_the_backends_python(ref, dense, tokens):
    installed("auto-gptq")
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        by_ray = through(dense, "auto-gptq", "gptq", {"group_size": 64}, tokens, ref)
        with pytest.raises(CellError, match="refused"):
            through(dense, "auto-gptq", "gptq", {"group_size": 64}, tokens, ref, shim=False)
    finally:
        ray.shutdown()
    alone = through(dense, "auto-gptq", "gptq", {"group_size": 64}, tokens, ref, via="subprocess")
    for name, s in alone.stored.items():
        assert torch.equal(by_ray.stored[name].codes, s.codes)


@pytest.mark.backends
def test_autoawq_without_its_shim_is_refused(ref, dense, tokens):
    installed("autoawq")
    with pytest.raises(CellError, match="refused: on a CPU"):
        through(dense, "autoawq", "awq", {"group_size": 64}, tokens, ref, shim=False, via="subprocess")


@pytest.mark.backends
def test_the_reason_to_refuse_it_is_real(ref, dense, tokens, tmp_path):
    """Left to itself on a CPU, AutoAWQ ends further from the dense model than with copies, and says nothing."""
    installed("autoawq")
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    job = {
        "model": str(backends._checkpoint(ref, tmp_path / "model", None)), "tokens": str(tmp_path / "tokens.npy"),
        "out": str(tmp_path / "out"), "result": str(tmp_path / "result.json"), "method": "awq",
        "params": check("autoawq", "awq", {"group_size": 64}), "dtype": "float32", "threads": 1, "shim": False, "unsafe": True,
    }  # fmt: skip
    backends._run_by_subprocess("autoawq", PINS / "autoawq.py", job, tmp_path, None)
    corrupt = read_checkpoint(tmp_path / "out", dense)
    right = through(dense, "autoawq", "awq", {"group_size": 64}, tokens, ref, via="subprocess")
    assert check_drift("x", corrupt, dense, tokens, None) > check_drift("x", right, dense, tokens, None)


READER = """
import sys, torch
from gptqmodel import GPTQModel
for folder in sys.argv[1:]:
    model = GPTQModel.load(folder, device="cpu", dtype=torch.float32).model
    with torch.inference_mode():
        torch.save(model(torch.arange(64)[None]).logits.float(), folder + ".logits")
"""


@pytest.mark.backends
def test_gptqmodel_reads_our_gptq_and_awq_layouts(loaded, tmp_path):
    installed("gptqmodel")
    dense, tokenizer = loaded
    made = {}
    for name, symmetric, group in (("gptq", True, 64), ("awq", False, 64), ("awq-channel", False, None)):
        made[name] = compress(dense, "rtn", {"bits": 4, "group_size": group, "symmetric": symmetric})
        export(made[name], tokenizer, tmp_path / name, format=name.partition("-")[0])
    python = environment("gptqmodel") / "bin" / "python"
    folders = [str(tmp_path / f) for f in made]
    done = subprocess.run([python, "-c", READER, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for format, compressed in made.items():
        with torch.inference_mode():
            ours = compressed.model(torch.arange(64)[None]).logits
        theirs = torch.load(tmp_path / f"{format}.logits", weights_only=True)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-2)  # its kernels run in 16 bit; logits reach 2
