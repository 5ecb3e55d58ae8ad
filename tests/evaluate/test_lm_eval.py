"""Our engine under lm-evaluation-harness against the harness's own Hugging Face model: same requests, same answers.

Slow for its imports; needs the extra ``lm-eval``.
"""

from __future__ import annotations

import json

import pytest
from comptrust.actors.errors import BadInput
from comptrust.actors.evaluate.generate import Generator

pytestmark = pytest.mark.slow

HEAD = "Question: What is the colour of the sky?\nAnswer: blue\n\nQuestion: What do bees make?\nAnswer: honey\n\n"
QUESTIONS = ["What is wet?", "Who wrote the letter to the council about the bonfire?", "Why?", "Where is the old harbour lamp?"]


def requests(kind: str):
    from lm_eval.api.instance import Instance

    out = []
    for i, q in enumerate(QUESTIONS):
        context = f"{HEAD}Question: {q}\nAnswer:"
        if kind == "loglikelihood":
            args = [(context, f" {end}") for end in ("water", "nobody", "on the hill", "A")] + [("", " nothing before it")]
        else:
            args = [(context, {"until": ["\n\n", " the"], "max_gen_toks": 12})]
        out += [Instance(request_type=kind, doc={}, arguments=a, idx=k, metadata=("t", i, 1)) for k, a in enumerate(args)]
    return out


@pytest.fixture(scope="module")
def both(tiny_model, tokenizer):
    from comptrust.actors.evaluate.lm_eval import Engine
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(pretrained=tiny_model, tokenizer=tokenizer, batch_size=4, max_length=4096)
    return Engine(Generator(tiny_model, tokenizer, batch_size=4)), peer


def test_likelihoods(both):
    ours, theirs = (m.loglikelihood(requests("loglikelihood"), disable_tqdm=True) for m in both)
    for (a, greedy_a), (b, greedy_b) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-3) and greedy_a == greedy_b


def test_generation(both):
    ours, theirs = (m.generate_until(requests("generate_until"), disable_tqdm=True) for m in both)
    assert ours == theirs and any(ours)


def test_rolling(both):
    from lm_eval.api.instance import Instance

    asked = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(HEAD * 3,), idx=0)]
    ours, theirs = (m.loglikelihood_rolling(asked, disable_tqdm=True) for m in both)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_whole_task(tiny_model, tokenizer, tmp_path):
    from comptrust.actors.evaluate.lm_eval import evaluate_tasks

    docs = [{"q": q, "choices": ["water", "nobody", "the hill"], "a": i % 3} for i, q in enumerate(QUESTIONS * 3)]
    (tmp_path / "d.json").write_text(json.dumps(docs))
    task = {
        "task": "small",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "d.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{q}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}],
    }
    (row,) = evaluate_tasks(Generator(tiny_model, tokenizer), [task])
    assert (row.dimension, row.scenario, row.metric, row.n) == ("utility", "small", "acc", 12)
    assert row.ci_low < row.value < row.ci_high


def test_unknown_task():
    from comptrust.actors.evaluate.lm_eval import check_tasks

    check_tasks(["hellaswag"])
    with pytest.raises(BadInput, match=r"evaluation.lm_eval: lm-evaluation-harness has no task 'helaswag'"):
        check_tasks(["helaswag"])
