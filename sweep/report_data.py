"""What the report's charts draw, as plain data: cells with names, rates, metrics and changes; models; bootstrap draws."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..actors.cell import DIMENSIONS, METHODS
from .effects import PRUNED, Effect, Effects
from .frontier import smaller_dense
from .names import asked, distinct
from .resampling import Resampler

Row = Mapping[str, Any]

NAMES = {
    "toxicity": "Toxicity",
    "stereotype": "Stereotype",
    "adversarial": "Robustness",
    "ood": "OOD",
    "demonstrations": "Adv. demos",
    "privacy": "Privacy",
    "ethics": "Ethics",
    "fairness": "Fairness",
}
#: Adjusted p below which a change, or equality within the band, is marked.
LEVEL = 0.05
#: Bootstrap draws that the page holds, and bytes that they may take all together; with fewer than the least there are none.
DRAWS, DRAW_BYTES, LEAST_DRAWS = 400, 1_100_000, 50


class Metric(NamedTuple):
    """A number of a cell that a chart may show. ``id`` is the column of the view ``results``."""

    id: str
    label: str
    better: str  # max or min
    unit: str = ""
    log: bool = False
    digits: int | None = None
    scale: float = 1.0
    short: str | None = None

    def value(self, row: Row) -> float | None:
        value = row[self.id]
        return None if value is None or not math.isfinite(value) else round(value / self.scale, 5)


METRICS = (
    Metric("trust", "Trust (mean of eight)", "max", digits=1, short="Trust"),
    Metric("worst_drop", "Worst drop", "min", "points", digits=1, short="Worst"),
    Metric("mmlu", "MMLU", "max", digits=1),
    Metric("perplexity", "Perplexity", "min", log=True, digits=2, short="PPL"),
    *(Metric(d, NAMES[d], "max", digits=1) for d in DIMENSIONS),
    Metric("kl_dense", "KL to dense", "min", "nats", log=True, digits=3),
    Metric("flips", "Flips against dense", "min", digits=3),
    Metric("top1_agreement", "Top-1 agreement with dense", "max", digits=3),
    Metric("size_bytes", "Size", "min", "GB", log=True, scale=1e9),
    Metric("bits_per_weight", "Bits per weight", "min", digits=2),
    Metric("bits", "Nominal bits", "min", digits=0),
    Metric("sparsity_reached", "Sparsity reached", "max", digits=2),
    Metric("decode_tokens_s", "Decode speed", "max", "tokens/s", log=True),
    Metric("prefill_tokens_s", "Prefill speed", "max", "tokens/s", log=True),
    Metric("peak_memory_bytes", "Peak memory", "min", "GB", log=True, scale=1e9),
    Metric("compress_s", "Compression time", "min", "s", log=True),
)
_FACTS = {
    "key": "Key", "status": "Status", "suite": "Suite", "method": "Method", "bits": "Bits", "group_size": "Group size",
    "sparsity": "Sparsity asked", "pattern": "Pattern", "backend": "Backend", "dtype": "Dtype", "execution": "Execution",
    "kernel": "Kernel", "calibration": "Calibration", "samples": "Calibration samples", "seqlen": "Calibration tokens a sample",
    "template": "Chat template", "seed": "Calibration seed", "overlap": "Calibration overlap", "parameters": "Parameters",
    "device": "Device", "evaluate_s": "Evaluation seconds", "params": "Parameters of the method",
}  # fmt: skip


# -- names ------------------------------------------------------------------------------------------------------------


def family(method: str) -> str:
    return "dense" if method == "dense" else "pruning" if method in PRUNED else "quantisation"


def rate(row: Row) -> tuple[str, float]:
    """The place on the axis of rates: label and order. Bits fall, then sparsity rises, then blocks of a pattern get smaller."""
    if row["method"] == "dense":
        return "dense", -1.0
    if family(row["method"]) == "pruning":
        share, pattern = row["sparsity"] if row["sparsity"] is not None else 0.5, row["pattern"]
        if pattern and ":" in pattern:
            return pattern, 100 + 100 * share + 1 / int(pattern.partition(":")[2])
        return f"{share:.0%}", 100 + 100 * share
    bits = row["bits"] or {"llm_int8": 8, "nf4": 4, "fp4": 4}.get(row["method"], 16)
    return f"{bits}-bit", 50.0 - bits


def label(row: Row) -> str:
    """Short name for people, seed aside: ``gptq 4-bit g128``, ``wanda 2:4``, ``dense``."""
    parts = [row["method"]]
    if row["method"] != "dense":
        parts.append(rate(row)[0])
        if row["group_size"] and row["group_size"] > 0:
            parts.append(f"g{row['group_size']}")
    return " ".join(parts)


def name_cells(rows: Sequence[Row]) -> list[str]:
    """Labels, distinct within a model."""
    return distinct(rows, [label(r) for r in rows])


def groups(rows: Sequence[Row]) -> list[str]:
    """The comparison that a cell belongs to: its model, with what was asked of it beside it where the record holds several."""
    several = len({r["suite"] for r in rows}) > 1
    pairs = zip(rows, asked(rows), strict=True)
    return [f"{r['model']} ({name})" if several or name != r["suite"] else r["model"] for r, name in pairs]


def sort_key(row: Row) -> tuple[Any, ...]:
    method = METHODS.index(row["method"]) if row["method"] in METHODS else len(METHODS)
    asked_of = (row["model"], str(row["suite"]), str(row["evaluation"]))
    return *asked_of, row["method"] != "dense", method, rate(row)[1], str(row["seed"]), row["key"]


# -- cells --------------------------------------------------------------------------------------------------------------


def facts(row: Row) -> list[tuple[str, str]]:
    """What the record says about a cell, as text."""
    out = [(m.label, _text(v, m.unit)) for m in METRICS if m.id not in DIMENSIONS and (v := m.value(row)) is not None]
    for column, name in _FACTS.items():
        value = row[column]
        if value not in (None, "", "{}"):
            out.append((name, _pairs(value) if column == "params" else _text(value)))
    return out


def _text(value: Any, unit: str = "") -> str:
    text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return f"{text} {unit}".strip()


def _pairs(text: str) -> str:
    return ", ".join(f"{k} {v}" for k, v in json.loads(text).items() if v not in (None, [], {}, ""))


def used_metrics(rows: Iterable[Row]) -> list[Metric]:
    """Metrics that vary over the cells, in the order of ``METRICS``."""
    rows = list(rows)
    return [m for m in METRICS if len({v for r in rows if (v := m.value(r)) is not None}) > 1]


def mark(effect: Effect, limit: float) -> str:
    """``worse``, ``better``, ``same`` or "": by Holm-adjusted tests where there are items, else by ``limit`` points."""
    if effect.delta is None:
        return ""
    if effect.basis == "items":
        if effect.significant:
            return "worse" if effect.delta < 0 else "better"
        return "same" if effect.p_equivalent is not None and effect.p_equivalent < LEVEL else ""
    return "worse" if effect.delta < -limit else "better" if effect.delta > limit else ""


def _dimension(row: Row, dimension: str, effect: Effect | None, limit: float) -> list[Any]:
    """[score, valid (None: not evaluated), refusal, delta, low, high, p, mark, seed-unstable]; the scripts name them."""
    score, refusal, valid = row[dimension], row[f"{dimension}_refusal"], row[f"{dimension}_valid"]
    if score is None and refusal is None:
        valid = None
    head = [_round(score), valid, _round(refusal)]
    if effect is None:
        return [*head, None, None, None, None, "", False]
    interval = [_round(effect.low), _round(effect.high)] if effect.basis == "items" else [None, None]
    return [*head, _round(effect.delta), *interval, _round(effect.p_holm), mark(effect, limit), effect.seed_unstable]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def measured(rows: Sequence[Row]) -> list[str]:
    """Dimensions that some cell was evaluated on."""
    return [d for d in DIMENSIONS if any(r[d] is not None or r[f"{d}_refusal"] is not None for r in rows)]


def cells(
    rows: Sequence[Row], effects: Effects, metrics: Sequence[Metric], dimensions: Sequence[str], limit: float
) -> list[dict[str, Any]]:
    """One dict a cell, in the order of ``rows``; cells refer to each other by their place."""
    index = {row["key"]: i for i, row in enumerate(rows)}
    variants: dict[str, int] = {}
    out = []
    for row, name, group in zip(rows, name_cells(rows), groups(rows), strict=True):
        of, (rate_label, order) = effects.of(row["key"]), rate(row)
        out.append(
            {
                "key": row["key"],
                "model": group,
                "label": name,
                "method": row["method"],
                "family": family(row["method"]),
                "rate": {"label": rate_label, "order": order},
                "variant": variants.setdefault(effects.seeds(row["key"])[0], len(variants)),
                "variant_label": label(row),
                "dense": index.get(row["dense_key"]),
                "invalid": any(row[f"{d}_valid"] is False and row[f"{d}_refusal"] is not None for d in DIMENSIONS),
                "d": [_dimension(row, d, of.get(d), limit) for d in dimensions],
                "v": {m.id: m.value(row) for m in metrics},
                "facts": facts(row),
                "search": f"{group} {name} {row['key']}".lower(),
            }
        )
    return out


def models(rows: Sequence[Row], page_cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Models in the order of their first cell, with the places of their dense cell and of the next smaller dense model."""
    index, small = {row["key"]: i for i, row in enumerate(rows)}, smaller_dense(rows)
    out: dict[str, dict[str, Any]] = {}
    for row, cell in zip(rows, page_cells, strict=True):
        model = out.setdefault(cell["model"], {"name": cell["model"], "dense": None, "small": None})
        model["dense"] = cell["dense"] if model["dense"] is None else model["dense"]
        if row["key"] in small:
            model["small"] = index[small[row["key"]]]
    return list(out.values())


# -- draws ---------------------------------------------------------------------------------------------------------------


def draws(effects: Effects, rows: Sequence[Row], metrics: Sequence[Metric]) -> dict[str, Any] | None:
    """Bootstrap draws for the page: deviations of the metrics that vary, and the seed that stands in for each cell.

    ``data``: int8 [cell, metric, draw] in steps of 1/127 of ``scale`` [cell, metric]; ``source``: int16 [draw, cell], the place of
    the cell whose row is drawn; both base64, little endian. None where nothing varies, or there are too many cells for the page.
    """
    metrics = [m for m in metrics if m.id in (*DIMENSIONS, "trust", "worst_drop", "mmlu")]  # the others have no items
    ids = [m.id for m in metrics]
    sampler = Resampler(effects.results, [r["key"] for r in rows], ids, seed=0, items=effects.items)
    count = min(DRAWS, DRAW_BYTES // max(1, len(rows) * len(ids)))
    if not sampler.basis or count < LEAST_DRAWS:
        return None
    noise, source = sampler.resample(count)
    steps = np.zeros((len(rows), len(ids), count)) if noise is None else noise.transpose(1, 2, 0) / [[m.scale] for m in metrics]
    reach = np.abs(steps).max(axis=-1)
    varies = (reach > 0).any(axis=0)
    steps, reach = steps[:, varies], reach[:, varies]
    steps = np.round(steps / np.where(reach > 0, reach, 1)[..., None] * 127)
    return {
        "metrics": [i for i, v in zip(ids, varies, strict=True) if v],
        "count": count,
        "basis": sampler.basis,
        "scale": [float(f"{v:.4g}") for v in reach.ravel()],
        "data": base64.b64encode(steps.astype(np.int8).tobytes()).decode(),
        "source": base64.b64encode(source.astype("<i2").tobytes()).decode(),
    }
