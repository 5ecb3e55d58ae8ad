from __future__ import annotations

import copy
import io
import json

import pyarrow.parquet as pq
import pytest
import torch
from comptrust.actors.compress.experts import mixtures, split_experts
from comptrust.actors.cost import speed
from comptrust.actors.errors import BadInput, CellError
from comptrust.actors.evaluate import TASKS, rejudge
from comptrust.actors.evaluate.config import EvaluationConfig
from comptrust.actors.evaluate.data import load_pack
from comptrust.actors.evaluate.run import check_evaluation, evaluate, plan_evaluation
from comptrust.actors.record import to_table
from pydantic import ValidationError
from transformers import GPT2Config

DIMENSIONS = ("stereotype", "ethics")


def config(**more) -> EvaluationConfig:
    base = {"suite": "smoke", "dimensions": DIMENSIONS, "per_dimension": 6, "perplexity": {"windows": 2, "seqlen": 40}}
    return EvaluationConfig(**{**base, **more})


def plan(**more):
    return plan_evaluation(config(**more), load_pack(""))


@pytest.fixture(scope="module")
def dense(tiny_model, tokenizer):
    return evaluate(tiny_model, tokenizer, plan(), dense=True)


def values(result) -> dict:
    return {(m.dimension, m.scenario, m.metric): m.value for m in result.metrics if m.convention == "comptrust"}


def test_dense_and_compressed(tiny_model, other_model, tokenizer, dense):
    names = set(values(dense))
    assert {
        ("utility", "", "perplexity"),
        ("divergence", "", "kl_dense"),
        ("ethics", "", "score"),
        ("stereotype", "", "valid"),
    } <= names
    assert values(dense)["divergence", "", "kl_dense"] == 0
    assert len(dense.items) == 12 and set(dense.reference_out) == {"logprob", "top1", "tokens", "outcomes"}

    again = evaluate(tiny_model, tokenizer, plan(), reference=dense.reference_out)
    assert again.items == dense.items and again.reference_out is None
    assert values(again)["divergence", "", "kl_dense"] < 1e-6
    flips = [v for k, v in values(again).items() if k[2] == "flips"]
    assert flips and not any(flips)

    cell = values(evaluate(other_model, tokenizer, plan(), reference=dense.reference_out))
    assert cell["divergence", "", "kl_dense"] > 0.01 and cell["divergence", "", "top1_agreement"] < 1
    assert cell["utility", "", "perplexity"] != values(dense)["utility", "", "perplexity"]


def test_computed_twice_is_identical(tiny_model, tokenizer, dense):
    again = evaluate(tiny_model, tokenizer, plan(), dense=True)
    assert (again.items, again.metrics) == (dense.items, dense.metrics)


def test_rows_fit_the_record_and_rescore_gives_the_same_metrics(dense):
    sink = io.BytesIO()
    pq.write_table(to_table("items", [{**r, "key": "k"} for r in dense.items]), sink)
    stored = [{**r, "target": json.loads(r["target"])} for r in pq.read_table(sink).to_pylist()]
    for name in DIMENSIONS:
        rows = [r for r in stored if r["dimension"] == name]
        assert TASKS[name].metrics(rejudge(name, rows), "smoke") == [m for m in dense.metrics if m.dimension == name]


def test_finished_tasks_are_not_computed_again(tiny_model, tokenizer, dense, monkeypatch):
    stored = to_table("items", [{**r, "key": "k"} for r in dense.items if r["dimension"] == "ethics"]).to_pylist()
    asked, told = [], []
    from comptrust.actors.evaluate import generate

    answer = generate.Generator.generate
    monkeypatch.setattr(
        generate.Generator, "generate", lambda self, prompts, d: asked.extend(prompts) or answer(self, prompts, d)
    )
    result = evaluate(
        tiny_model,
        tokenizer,
        plan(),
        dense=True,
        done={"ethics": stored[::-1]},
        on_task=lambda name, rows: told.append((name, len(rows))),
    )
    assert told == [("stereotype", 6)] and len(asked) == 6
    assert (result.items, result.metrics) == (dense.items, dense.metrics)

    del asked[:], told[:]  # an unfinished task, or one whose texts were not kept, is asked again
    evaluate(tiny_model, tokenizer, plan(), done={"ethics": stored[:-1], "stereotype": []}, on_task=lambda n, r: told.append(n))
    assert told == ["stereotype", "ethics"] and len(asked) == 12
    foreign = [*stored, {**stored[0], "item": "another"}]
    with pytest.raises(CellError, match="another plan"):
        evaluate(tiny_model, tokenizer, plan(), done={"ethics": foreign})


def test_without_text(tiny_model, tokenizer, dense):
    kept = []
    result = evaluate(tiny_model, tokenizer, plan(keep_text=False), dense=True, on_task=lambda name, rows: kept.extend(rows))
    assert result.metrics == dense.metrics
    assert all(r["text"] is None and r["text_sha"] for r in [*result.items, *kept])
    assert [r["text_sha"] for r in result.items] == [r["text_sha"] for r in dense.items]
    assert plan(keep_text=False, batch_size=3).digest == plan().digest


def test_progress_reaches_its_end(tiny_model, tokenizer):
    seen = {}

    def progress(stage: str, done: int, total: int) -> None:
        assert done >= seen.get(stage, (0, 0))[0]
        seen[stage] = (done, total)

    evaluate(tiny_model, tokenizer, plan(), progress=progress)
    assert seen == {"perplexity": (2, 2), "stereotype": (6, 6), "ethics": (6, 6)}


@pytest.mark.parametrize(
    "change",
    [
        {"dimensions": ("ethics",)},
        {"per_dimension": 7},
        {"suite": "standard"},
        {"seed": 1},
        {"template": "plain"},
        {"perplexity": None},
        {"perplexity": {"windows": 3, "seqlen": 40}},
        {"lm_eval": ("arc_easy",)},
    ],
)
def test_what_changes_an_answer_changes_the_digest(change):
    assert plan(**change).digest != plan().digest
    assert plan().digest == plan().digest and plan(dimensions=DIMENSIONS[::-1]).digest == plan().digest


def test_digest_follows_prompts_pack_and_text(tmp_path, monkeypatch):
    before = plan().digest
    (tmp_path / "t.txt").write_text("one")
    text = {"windows": 2, "seqlen": 40, "source": str(tmp_path / "t.txt")}
    one = plan(perplexity=text).digest
    (tmp_path / "t.txt").write_text("two")
    assert plan(perplexity=text).digest != one
    from comptrust.actors.evaluate.ethics import TASK
    from comptrust.actors.evaluate.protocol import Message

    monkeypatch.setattr(type(TASK), "messages", lambda self, item: [Message("user", "What now?")])
    assert plan().digest != before


def test_plan_counts():
    p = plan(suite="smoke")
    assert p.answers == 12 and [t.name for t in p.tasks] == list(DIMENSIONS)
    assert p.new_tokens == sum(d.max_new_tokens for t in p.tasks for d in t.decodings)


def test_sampled_dimensions_give_their_samples(tiny_model, tokenizer):
    p = plan(suite="standard", dimensions=("stereotype",), per_dimension=2, mmlu=False, perplexity=None)
    assert [d.samples for d in p.tasks[0].decodings] == [5, 5]
    short = copy.copy(p.tasks[0])
    object.__setattr__(short, "decodings", tuple(type(d)(6, d.samples, d.temperature) for d in short.decodings))
    result = evaluate(tiny_model, tokenizer, type(p)(p.config, p.pack_name, p.pack_digest, (short,), p.text_sha))
    assert [r["sample"] for r in result.items] == [0, 1, 2, 3, 4] * 2
    assert len({r["text"] for r in result.items}) > 5 and len({r["item"] for r in result.items}) == 2


def test_bad_input(tokenizer, tmp_path):
    (tmp_path / "toxicity.jsonl").write_text('{"id": "a", "text": "x", "split": "toxic"}\n')
    with pytest.raises(BadInput, match=r"evaluation.dimensions: the data pack .* has no items for ethics\. Leave ethics out"):
        plan_evaluation(config(dimensions=("ethics",)), load_pack(str(tmp_path)))
    with pytest.raises(BadInput, match=r"evaluation.perplexity.source: cannot read 'absent.txt'"):
        plan(perplexity={"source": "absent.txt"})
    with pytest.raises(ValidationError, match="unknown dimension 'toxcity'"):
        config(dimensions=("toxcity",))
    with pytest.raises(ValidationError, match="Extra inputs"):
        config(sute="smoke")
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(BadInput, match="no chat template"):
        check_evaluation(config(), bare)
    check_evaluation(config(template="plain"), bare)
    with pytest.raises(BadInput, match="are asked for"):
        check_evaluation(config(perplexity={"windows": 1000}), tokenizer)
    small = GPT2Config(n_positions=64)
    check_evaluation(config(perplexity={"windows": 1, "seqlen": 64}), tokenizer, small)
    with pytest.raises(
        BadInput, match=r"evaluation.perplexity.seqlen: windows of 65 tokens do not fit the model's context of 64"
    ):
        check_evaluation(config(perplexity={"windows": 1, "seqlen": 65}), tokenizer, small)


def test_every_task_runs(tiny_model, tokenizer):
    """All dimensions and MMLU through the engine, a few items each; what they score is the tasks' business."""
    pack = load_pack("")
    names = tuple(d for d in TASKS if d != "mmlu")
    p = plan_evaluation(config(dimensions=names, per_dimension=2, mmlu="mmlu" in pack.names, perplexity=None), pack)
    result = evaluate(tiny_model, tokenizer, p)
    assert {r["dimension"] for r in result.items} >= set(names)
    assert {m.dimension for m in result.metrics} >= set(names)
    assert result.stats["prefill_tokens"] > 0 and result.stats["truncated"] == 0


def test_a_mixture_answers_with_all_experts_of_a_layer_in_one_call(tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    shape = AutoConfig.for_model(
        "qwen3_moe", vocab_size=len(tokenizer), num_experts=6, num_experts_per_tok=2, pad_token_id=0, **sizes
    )
    model = split_experts(AutoModelForCausalLM.from_config(shape).eval().requires_grad_(False))
    alone, calls = [], []
    for experts in mixtures(model).values():
        experts.fused.register_forward_hook(lambda *_: calls.append(1))
        for name in ("0.down_proj", "5.down_proj"):
            experts.get_submodule(name).register_forward_hook(lambda *_: alone.append(1))
    evaluate(model, tokenizer, plan(dimensions=("ethics",)), dense=True)
    answered = len(calls)
    assert answered > 2 and not alone
    speed(model)
    assert len(calls) > answered and not alone
    model(torch.tensor([[1, 2, 3] * 20]))
    assert alone


def test_cut_prompts_are_counted_aloud(tiny_model, tokenizer, monkeypatch, caplog):
    evaluate(tiny_model, tokenizer, plan(dimensions=("ethics",)), dense=True)
    assert not caplog.records
    monkeypatch.setattr(tiny_model.config, "max_position_embeddings", 100)
    evaluate(tiny_model, tokenizer, plan(dimensions=("ethics",)), dense=True)
    assert "of 100 tokens and lost their beginning" in caplog.text
