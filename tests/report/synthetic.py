"""A deterministic record, written as an actor writes it: two models, every family of methods, seeds, a collapsed cell with
invalid dimensions, failed cells and hostile answers. Scores follow from the items by the tasks' own formulas."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
from functools import cache
from pathlib import Path

import numpy as np
from comptrust.actors.cell import DIMENSIONS, canonical, digest
from comptrust.actors.evaluate import TASKS, conventions
from comptrust.actors.evaluate.data import load_pack
from comptrust.actors.evaluate.protocol import Item
from comptrust.actors.evaluate.suites import select
from comptrust.actors.record import DIVERGENCE, UTILITY, Record

HOSTILE = (
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=2</script>",
    "<img src=x onerror='window.pwned=3'>",
    "access \u202egnp.exe\u202c\u2066\u200b granted",
    "]]>\u2028\u2029<!-- <svg/onload=window.pwned=4>",
    '=HYPERLINK("http://example.invalid")\x00\x07 \'quoted\' "twice" `three`',
)
#: (method, bits, pattern, sparsity, seeds, strength of the damage)
VARIANTS = (
    ("rtn", 8, None, None, (None,), 0.004),
    ("rtn", 4, None, None, (None,), 0.07),
    ("gptq", 8, None, None, (0,), 0.004),
    ("gptq", 4, None, None, (0, 1, 2), 0.03),
    ("gptq", 3, None, None, (0, 1, 2), 0.15),
    ("awq", 4, None, None, (0, 1, 2), 0.02),
    ("awq", 3, None, None, (0,), 0.11),
    ("nf4", 4, None, None, (None,), 0.04),
    ("magnitude", None, "2:4", 0.5, (None,), 0.38),
    ("wanda", None, "2:4", 0.5, (0, 1, 2), 0.22),
    ("wanda", None, "unstructured", 0.25, (0,), 0.03),
    ("sparsegpt", None, "2:4", 0.5, (0,), 0.20),
    ("sparsegpt", None, "4:8", 0.5, (0,), 0.15),
)
MODELS = (("acme/lm-13b-chat", 13_000_000_000, 0.78), ("acme/lm-7b-chat", 7_000_000_000, 0.72))
BIRTH = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)


def uniform(*parts: object) -> float:
    """A number in [0, 1) from a name."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


def specs(copies: int = 1) -> list[dict]:
    """Descriptions of all cells; ``copies`` > 1 repeats the grid with other group sizes (a large sweep)."""
    out = []
    for model, parameters, skill in MODELS:
        base = {"model": model, "parameters": parameters, "skill": skill}
        out.append(
            {
                **base,
                "method": "dense",
                "bits": None,
                "pattern": None,
                "sparsity": None,
                "seed": None,
                "damage": 0.0,
                "group": None,
            }
        )
        for copy, (method, bits, pattern, sparsity, seeds, damage) in itertools.product(range(copies), VARIANTS):
            for seed in seeds:
                group = 128 * 2**copy if bits and method != "nf4" else None
                out.append(
                    {**base, "method": method, "bits": bits, "pattern": pattern, "sparsity": sparsity, "seed": seed,
                     "damage": damage * (1 + 0.07 * copy), "group": group, "copy": copy}
                )  # fmt: skip
    return out


@cache
def prompts(dimension: str, per_dimension: int) -> tuple[tuple[Item, str, str], ...]:
    """Items of the real task on the built-in probes, with the JSON of their target and the digest of their prompt."""
    items = select(TASKS[dimension].items(load_pack("")), "smoke", per_dimension)
    return tuple((item, canonical(dict(item.target)), digest([dimension, item.id])) for item in items)


def answers(spec: dict, per_dimension: int) -> list[dict]:
    """Stored items of one cell. The same item is equally hard for every cell, as in a real sweep."""
    rows = []
    who = (spec["model"], spec["method"], spec["bits"], spec["pattern"], spec["seed"], spec.get("copy", 0))
    for dimension in DIMENSIONS:
        weight = 0.4 + 1.2 * uniform("weight", dimension, spec["method"])
        p = (
            spec["skill"]
            + 0.1 * (uniform("level", dimension) - 0.5)
            - spec["damage"] * weight
            + 0.04 * (uniform(who, dimension) - 0.5)
        )
        collapsed = spec["damage"] > 0.35 and dimension in ("privacy", "ood")
        for n, (item, target, prompt) in enumerate(prompts(dimension, per_dimension)):
            difficulty = 0.85 * uniform("item", dimension, n) + 0.15 * uniform("noise", who, dimension, n)
            good = difficulty < p
            outcome, score = ("correct", 1.0) if good else ("wrong", 0.0)
            text = f"{'Yes' if good else 'No'}, answer {n} of {dimension}."
            if dimension == "toxicity":
                outcome, score = "scored", round(1 - (0.1 + 0.8 * (1 - p)) * difficulty, 4)
                text = f"A continuation of prompt {n} that a scorer rated {score}."
            if uniform("refuse", who, dimension, n) < (0.3 if dimension == "ethics" and spec["method"] == "wanda" else 0.05):
                outcome, score, text = "refused", 0.0, "I'm sorry, but I can't help with that."
            if collapsed and n % 3:
                outcome, score, text = "degenerate", None, "the the the the the the the the"
            if n < len(HOSTILE) and dimension in ("adversarial", "stereotype"):
                text = HOSTILE[n]
            rows.append(
                {
                    "dimension": dimension,
                    "scenario": item.scenario,
                    "item": item.id,
                    "sample": 0,
                    "cluster": item.cluster,
                    "prompt_sha": prompt,
                    "target": target,
                    "outcome": outcome,
                    "finish_reason": "stop",
                    "score": score,
                    "text": text,
                    "text_sha": digest(text),
                }
            )
    return rows


def measured(rows: list[dict], spec: dict, *, intervals: bool) -> list[dict]:
    """Metrics by the tasks' own formula; intervals cost most of the time and a large record goes without."""
    out = []
    for dimension in DIMENSIONS:
        part = [{**r, "target": json.loads(r["target"])} for r in rows if r["dimension"] == dimension]
        cells, combine = TASKS[dimension].parts(part)
        means = {name: np.array([np.mean([v for _, v in pairs])]) for name, pairs in cells.items() if pairs}
        estimate = (
            conventions.estimate(cells, combine)
            if intervals
            else conventions.Estimate(float(combine(means)[0]) if means else None)
        )
        out += [row._asdict() for row in conventions.comptrust(dimension, part, estimate)]
    wear = spec["damage"] * (1 + 0.1 * uniform("wear", spec["method"], spec["seed"]))
    for dimension, metric, value in (
        (UTILITY, "mmlu", 55 * (1 - wear)),
        (UTILITY, "perplexity", 5.5 * (1 + 6 * wear)),
        (DIVERGENCE, "kl_dense", wear),
        (DIVERGENCE, "flips", min(1.0, 1.2 * wear)),
    ):
        if spec["method"] != "dense" or dimension == UTILITY:
            out.append(
                {"convention": "comptrust", "dimension": dimension, "scenario": "", "metric": metric, "value": value, "n": 100}
            )
    return out


def cell_row(spec: dict) -> dict:
    bits_per_weight = (
        16.0 if spec["method"] == "dense" else (spec["bits"] or 9) + (16 / spec["group"] if spec["group"] else 0.25)
    )
    params = {k: spec[k] for k in ("bits", "pattern", "sparsity") if spec[k] is not None} | (
        {"group_size": spec["group"]} if spec["group"] else {}
    )
    key = digest({k: v for k, v in spec.items() if k != "skill"})
    return {
        "key": key,
        "artifact_key": digest([key]),
        "model": spec["model"],
        "revision": "r1",
        "method": spec["method"],
        "bits": spec["bits"],
        "group_size": spec["group"],
        "sparsity": spec["sparsity"],
        "pattern": spec["pattern"],
        "params": params,
        "backend": "comptrust",
        "dtype": "bfloat16",
        "calibration": "builtin" if spec["seed"] is not None else None,
        "calibration_digest": digest(spec["seed"]) if spec["seed"] is not None else None,
        "seed": spec["seed"],
        "suite": "smoke",
        "evaluation": "e1",
        "status": "done",
        "attempts": 1,
        "parameters": spec["parameters"],
        "size_bytes": int(spec["parameters"] * bits_per_weight / 8),
        "bits_per_weight": bits_per_weight,
        "sparsity_reached": spec["sparsity"],
        "compress_s": 60.0,
        "evaluate_s": 300.0,
        "peak_memory_bytes": 30 * 2**30,
        "decode_tokens_s": 40 * 16 / bits_per_weight,
        "device": "synthetic",
        "versions": {"comptrust": "0.1.0"},
        "started_at": BIRTH,
        "finished_at": BIRTH + datetime.timedelta(minutes=6),
    }


def write(folder: str | Path, *, copies: int = 1, per_dimension: int = 48, intervals: bool = True) -> Path:
    """Write the record and return ``folder``."""
    record = Record(folder)
    for spec in specs(copies):
        rows = answers(spec, per_dimension)
        record.commit(cell_row(spec), measured(rows, spec, intervals=intervals), rows)
    broken = {**specs()[0], "method": "gptq", "bits": 2, "seed": 7, "group": 64}
    for attempt, (kind, message) in enumerate(
        [("CellError", "no memory"), ("CellError", f"Hessian is singular {HOSTILE[1]} {HOSTILE[3]}")], 1
    ):
        record.fail({**cell_row(broken), "error_type": kind, "error": message, "attempts": attempt})
    record.put_json("sweeps/synthetic.json", {"config": {}, "keys": []})
    return Path(folder)
