"""A model on a GPU, or over two, gives what it gives on the CPU, and everything lies where it belongs. Without a GPU: simulated_gpus.py."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from comptrust.actors.compress import METHODS, compress, engine
from comptrust.actors.compress.artifacts import dump, restore
from comptrust.actors.evaluate.generate import Generator, Prompt
from comptrust.actors.evaluate.protocol import Decoding
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from simulated_gpus import OnGpu, put_on, simulated_gpus, spread

TOKENS = torch.randint(0, 128, (12, 32), generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt("a", tuple(range(5))), Prompt("b", tuple(range(3, 20))), Prompt("c", tuple(range(50, 53)))]
PAIRS = [((1, 2, 3), (4, 5)), ((1, 2, 3), (6,)), (tuple(range(90)), (7, 8))]
CELLS = [
    ("rtn", {"group_size": 32}),
    ("gptq", {"group_size": 32}),
    ("awq", {"group_size": 32}),
    ("smoothquant", {}),
    ("magnitude", {"scope": "global"}),
    ("wanda", {"pattern": "2:4"}),
    ("sparsegpt", {}),
    ("gblm", {}),
]


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
        max_position_embeddings=256, tie_word_embeddings=tied, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def places(model) -> dict[str, torch.device]:
    return {name: p.device for name, p in model.named_parameters()}


class Numbers:
    eos_token_id = None

    def get_added_vocab(self) -> dict:
        return {}

    def decode(self, tokens, **_) -> str:
        return str(tokens)


def answer(model) -> tuple:
    generator = Generator(model, Numbers(), batch_size=2)
    answers, scores = generator.generate(PROMPTS, Decoding(6)), generator.score(PAIRS)
    return [a.tokens for a in answers], [round(s.logprob, 3) for s in scores]


def test_the_simulation_refuses_what_cuda_refuses():
    model = put_on(llama())
    with simulated_gpus():
        with pytest.raises(RuntimeError, match="same device"):
            model(input_ids=TOKENS[:1])
        logits = model(input_ids=TOKENS[:1].to("cuda:0")).logits
        assert logits.device == torch.device("cuda", 0)
        assert torch.allclose(logits.cpu(), llama()(input_ids=TOKENS[:1]).logits, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", [put_on, spread])
def test_answers_and_likelihoods(place, tied):
    expected = answer(llama(tied))
    with simulated_gpus():
        assert answer(place(llama(tied))) == expected


@pytest.mark.parametrize(("method", "params", "chunk"), [(*cell, None) for cell in CELLS] + [("gptq", {"group_size": 32}, 96)])
def test_a_spread_model_is_compressed_where_it_lies(method, params, chunk):
    spec = METHODS[method]
    config = spec.config.model_validate(params)
    (expected,) = engine.run(llama(), [(spec, config)], TOKENS, chunk_tokens=chunk)
    with simulated_gpus():
        model = spread(llama())
        (done,) = engine.run(model, [(spec, config)], TOKENS, chunk_tokens=chunk)
        assert places(done.model) == places(model)
        for name, stored in done.stored.items():
            here = model.get_submodule(name).weight.device
            assert all(t.device == here for t in (stored.codes, stored.scale) if t is not None), name
        logits = done.model(input_ids=TOKENS[:2].to("cuda:0")).logits.cpu()
    wanted = expected.model(input_ids=TOKENS[:2]).logits
    assert (logits - wanted).norm() < 5e-3 * wanted.norm()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_no_codes_stay_on_the_gpu_when_blocks_are_streamed(method):
    """A model in host memory may be far larger than the GPU, and so may its codes."""
    left = []

    def after_block(stage, done, total):
        gc.collect()
        left.append(sum(isinstance(t, OnGpu) and t.dtype == torch.int8 for t in gc.get_objects()))

    config = METHODS[method].config.model_validate({"group_size": 32})
    with simulated_gpus():
        (done,) = engine.run(llama(), [(METHODS[method], config)], TOKENS, device=torch.device("cuda", 0), progress=after_block)
    assert left == [0] * 4
    assert {s.codes.device.type for s in done.stored.values()} == {"cpu"}


@pytest.mark.parametrize("place", [put_on, spread])
def test_gblm_keeps_inputs_and_gradients_in_host_memory(place):
    """Of a model on the GPU: those of all blocks would take several times its room."""
    left = []

    def after_block(stage, done, total):
        gc.collect()
        sizes = (TOKENS.shape[1] * 64, 160 * 64)  # the input of a block, the gradient of a linear
        left.append(sum(isinstance(t, OnGpu) and t.dtype == torch.float32 and t.numel() in sizes for t in gc.get_objects()))

    with simulated_gpus():
        model = place(llama())
        linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
        where = [next(block.parameters()).device for block in model.model.layers]
        config = METHODS["gblm"].config()
        found = METHODS["gblm"].prepare(model, linears, config, tokens=TOKENS, places=where, progress=after_block)
    assert {norm.device.type for norm in found.norms.values()} == {"cpu"}
    assert left == [left[0]] * 4 + [left[4]] * 4  # a pass up, a pass down: no more with each block


@pytest.mark.parametrize("place", [put_on, spread])
def test_artefacts_come_back_where_the_model_lies(place):
    made = compress(llama(), "gptq", {"group_size": 32}, TOKENS)
    with simulated_gpus():
        model = place(llama())
        done = compress(model, "gptq", {"group_size": 32}, TOKENS)
        tensors, meta = dump(done, model)
        assert len(meta["rebuilt"]) == len(done.stored)
        back = restore(model, {name: t.cpu() for name, t in tensors.items()}, meta)
        assert places(back.model) == places(model)
        # a checkpoint that another library wrote is read with codes on the CPU
        read = place(made.model)
        made.model = read
        assert len(dump(made, model)[1]["rebuilt"]) == len(made.stored)


def test_what_lies_on_the_gpu_leaves_less_for_activations():
    budget = {}
    with simulated_gpus(memory=2**30):
        for model in (llama(), put_on(llama())):
            budget[next(model.parameters()).device.type] = engine._budget(model, torch.device("cuda", 0))
    assert budget["cpu"] == 0.4 * 2**30
    weights = sum(p.numel() for p in llama().parameters())
    assert budget["cuda"] == pytest.approx(0.4 * (2**30 - weights * (4 + 4 + 1)))


def test_memory_in_torchs_own_cache_is_free(monkeypatch):
    """Of 1000 bytes 100 are free, 600 in the cache and unused: a batch may take 40% of 700."""
    with simulated_gpus():
        generator = Generator(put_on(llama()), None)
        row = lambda: type("Row", (), {"path": range(3), "cache": type("Cache", (), {"bytes_a_slot": 140 / 64})})()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 1000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 900)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 300)
        assert generator._fits([row(), row()], Decoding(6))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 310)
        assert not generator._fits([row(), row()], Decoding(6))


@pytest.mark.parametrize(
    ("method", "params"),
    [("gptq", {"bits": 4, "group_size": 32}), ("smoothquant", {}), ("gblm", {}), ("magnitude", {"scope": "global"})],
)
def test_a_model_larger_than_the_gpu_is_compressed(method, params, tmp_path, monkeypatch):
    """From the command line a model waits in host memory, and its blocks visit the GPU one by one; GBLM takes it whole."""
    from comptrust.actors import api, models
    from tiny import make_tiny_model

    folder, options = make_tiny_model(tmp_path / "tiny"), {"calibration": {"samples": 4, "seqlen": 64}, "dtype": "float32"}
    expected = api.compress(folder, method, params, **options)["model"].state_dict()
    load, asked = models.load, []

    def loaded(ref, *, device, **more):
        asked.append(device)
        return load(ref, device="cpu", **more)

    monkeypatch.setattr(models, "load", loaded)
    monkeypatch.setattr(api, "_device", lambda: "cuda")
    with simulated_gpus():
        done = api.compress(folder, method, params, **options)["model"].state_dict()
    assert asked == ["cuda" if method == "gblm" else "cpu"]
    for name, value in done.items():
        off = (value - expected[name]).norm()  # the simulation's attention rounds otherwise, so a code may be another
        assert value.device.type == "cpu" and off < 5e-3 * expected[name].norm(), name


@pytest.mark.parametrize(("place", "count"), [(put_on, 1), (spread, 2)])
def test_a_whole_cell_on_a_gpu_measures_what_it_does_on_a_cpu(place, count, tmp_path, monkeypatch):
    """Loading, compressing, every measurement and the record, dense and compressed."""
    from comptrust.actors import models
    from comptrust.actors.actor import Worker, WorkerConfig
    from comptrust.sweep.config import load_config
    from comptrust.sweep.grid import expand
    from tiny import make_tiny_model

    sweep = {
        "name": "devices",
        "models": [{"id": str(make_tiny_model(tmp_path / "tiny")), "dtype": "float32"}],
        "methods": [{"method": "gptq", "bits": 3, "group_size": 32}],
        "calibration": {"samples": 4, "seqlen": 64},
        "evaluation": {"suite": "smoke", "dimensions": ["stereotype", "ethics"], "perplexity": {"windows": 2, "seqlen": 128}},
        "results": str(tmp_path),
    }
    config = load_config(sweep)
    evaluation, cells = config.evaluation.model_dump(mode="json"), expand(config).cells

    def rows(folder):
        worker = Worker(WorkerConfig(str(folder), evaluation, cache_gb=0.1))
        return [worker.run(cell) for cell in cells]

    expected = rows(tmp_path / "cpu")
    load = models.load

    def loaded(ref, *, device, **more):
        assert device == ("auto" if count > 1 else "cuda")
        model, tokenizer = load(ref, device="cpu", **more)
        return place(model), tokenizer

    monkeypatch.setattr(models, "load", loaded)
    with simulated_gpus(count=count):
        found = rows(tmp_path / "gpu")
    assert [(r["status"], r["device"]) for r in found] == [("done", "simulated")] * 2, [r.get("error") for r in found]
    named = lambda row: {(m["dimension"], m["scenario"], m["metric"], m["convention"]): m["value"] for m in row["metrics"]}
    for here, there in zip(found, expected, strict=True):
        assert named(here) == {key: v if v is None else pytest.approx(v, rel=1e-3) for key, v in named(there).items()}
