"""Our engine under lm-evaluation-harness against the harness's own Hugging Face model: same requests, same answers.

Slow for its imports; needs the extra ``lm-eval``.
"""

from __future__ import annotations

import json
from pathlib import Path

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


@pytest.mark.parametrize("length", [20, 31, 32, 33, 70])
def test_rolling_over_several_windows(tiny_model, tokenizer, length):
    """As of wikitext: windows that fill the context to the last token."""
    from comptrust.actors.evaluate.lm_eval import Engine
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    generator = Generator(tiny_model, tokenizer, batch_size=4)
    generator.limit = 32
    peer = HFLM(pretrained=tiny_model, tokenizer=tokenizer, batch_size=4, max_length=32)
    text = tokenizer.decode(tokenizer(HEAD * 3).input_ids[:length])
    asked = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)]
    ours, theirs = (m.loglikelihood_rolling(asked, disable_tqdm=True) for m in (Engine(generator), peer))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_repeats_are_different_draws(both):
    """The harness hands one request over as often as a task's ``repeats`` says (pass@k, self-consistency)."""
    from lm_eval.api.instance import Instance

    args = (HEAD + "Question: Why?\nAnswer:", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []})
    asked = Instance(request_type="generate_until", doc={}, arguments=args, idx=0, metadata=("t", 0, 6))
    first, again = (both[0].generate_until([asked] * 6, disable_tqdm=True) for _ in range(2))
    assert len(set(first)) > 3 and first == again


def test_a_whole_task(tiny_model, tokenizer, tmp_path):
    from comptrust.actors.evaluate.lm_eval import evaluate_tasks, load_tasks

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
    (row,) = evaluate_tasks(Generator(tiny_model, tokenizer), load_tasks([task]))
    assert (row.dimension, row.scenario, row.metric, row.n) == ("utility", "small", "acc", 12)
    assert row.ci_low < row.value < row.ci_high


def test_a_bootstrapped_metric(tiny_model, tokenizer, tmp_path, capsys, monkeypatch):
    """As of lambada. The harness prints what it bootstraps, and forks; stdout is the caller's (`evaluate --format json`)."""
    import multiprocessing

    from comptrust.actors.evaluate.lm_eval import evaluate_tasks, load_tasks

    monkeypatch.setattr(multiprocessing, "Pool", None)
    (tmp_path / "d.json").write_text(json.dumps([{"q": q} for q in QUESTIONS]))
    task = {
        "task": "small", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "d.json")}},
        "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{q}}", "doc_to_target": " not the greedy answer",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }  # fmt: skip
    rows = {r.metric: r for r in evaluate_tasks(Generator(tiny_model, tokenizer), load_tasks([task]))}
    assert capsys.readouterr().out == ""
    assert rows["perplexity"].ci_low < rows["perplexity"].value < rows["perplexity"].ci_high
    assert rows["acc"].value == 0 and rows["acc"].ci_low is rows["acc"].ci_high is None  # all alike: no error to tell


def test_a_group_counts_the_documents_of_its_tasks(tiny_model, tokenizer, tmp_path, monkeypatch):
    from comptrust.actors.evaluate import lm_eval
    from comptrust.actors.evaluate.lm_eval import evaluate_tasks, load_tasks

    for name, n in (("one", 3), ("two", 4)):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"q": q, "choices": ["a", "b"], "a": 0} for q in QUESTIONS[:n]]))
        task = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.json")}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "a", "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    group = {"group": "both_of_them", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "group.yaml").write_text(json.dumps(group))
    (tmp_path / "without.yaml").write_text(json.dumps({"group": "no_figures", "task": ["both_of_them"]}))
    manager = lm_eval.TaskManager
    monkeypatch.setattr(lm_eval, "TaskManager", lambda: manager(include_path=str(tmp_path)))
    rows = evaluate_tasks(Generator(tiny_model, tokenizer), load_tasks(["no_figures"]))
    assert {r.scenario: r.n for r in rows if r.metric == "acc"} == {"both_of_them": 7, "one": 3, "two": 4}


def test_unknown_task():
    from comptrust.actors.evaluate.lm_eval import check_tasks

    check_tasks(["hellaswag"])
    with pytest.raises(BadInput, match=r"evaluation.lm_eval: lm-evaluation-harness has no task 'helaswag'"):
        check_tasks(["helaswag"])
    with pytest.raises(BadInput, match=r"has no task 'mmlu_\*'"):  # which its Python API does not take
        check_tasks(["mmlu_*"])
    with pytest.raises(
        BadInput, match=r"'tasks/mine.yaml' is a file; .* Copy the file to .*lm_eval.tasks on every machine and give"
    ):
        check_tasks(["tasks/mine.yaml"])


def test_a_task_named_twice():
    """The harness refuses it when it loads the tasks, which is at the end of a cell."""
    from comptrust.actors.evaluate.lm_eval import check_tasks

    check_tasks(["mmlu_stem", "mmlu_humanities", "hellaswag", "ai2_arc", "arc_easy"])  # ai2_arc is a tag: its tasks
    with pytest.raises(BadInput, match="'mmlu_anatomy' is in both 'mmlu' and 'mmlu_anatomy'"):
        check_tasks(["mmlu", "mmlu_anatomy"])
    with pytest.raises(BadInput, match=r"'leaderboard_\w+' is in both 'leaderboard' and 'leaderboard_bbh'"):
        check_tasks(["leaderboard", "leaderboard_bbh"])


def test_data_that_cannot_be_had_are_told_before_the_work(tmp_path, tiny_model, tokenizer, monkeypatch):
    """The harness reads them when it asks its questions, which is at the end of a cell."""
    from comptrust.actors.evaluate import lm_eval
    from comptrust.actors.evaluate.config import EvaluationConfig
    from comptrust.actors.evaluate.data import load_pack
    from comptrust.actors.evaluate.run import evaluate, plan_evaluation

    absent = {"data_files": {"test": str(tmp_path / "absent.json")}}
    task = {"task": "absent", "dataset_path": "json", "dataset_kwargs": absent, "test_split": "test"}
    (tmp_path / "absent.yaml").write_text(json.dumps(task))
    manager = lm_eval.TaskManager
    monkeypatch.setattr(lm_eval, "TaskManager", lambda: manager(include_path=str(tmp_path)))
    stages = []
    config = EvaluationConfig(suite="smoke", dimensions=("ethics",), perplexity=None, lm_eval=("absent",))
    plan = plan_evaluation(config, load_pack(""))
    with pytest.raises(
        BadInput, match=r"evaluation.lm_eval: lm-evaluation-harness cannot load its tasks absent: .*absent.json"
    ):
        evaluate(tiny_model, tokenizer, plan, progress=lambda stage, done, total: stages.append(stage))
    assert stages == ["lm-eval data"]


def test_a_sweep_starts_no_cell_without_the_data(tmp_path):
    import os
    import subprocess
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent))  # tests/tiny.py
    from tiny import make_tiny_model

    config = {
        "name": "t", "models": [str(make_tiny_model(tmp_path / "tiny"))], "results": str(tmp_path / "results"),
        "evaluation": {"suite": "smoke", "dimensions": ["ethics"], "perplexity": None, "lm_eval": ["arc_easy"]},
        "methods": [], "wandb": {"mode": "disabled"},
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(json.dumps(config))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "comptrust.sweep", "run", str(tmp_path / "s.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: evaluation.lm_eval:"), done.stderr
    assert "cannot load its tasks arc_easy" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "results" / "cells").exists()
