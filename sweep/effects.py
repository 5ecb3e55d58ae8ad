"""What compression did to each cell and dimension, against the dense cell of the same model and evaluation.

The estimate is the dimension's own formula on the stored items; its uncertainty comes from leaving out one cluster (source
prompt) at a time in both cells alike (paired jackknife), which works for any formula a task has, and feeds the paired
bootstrap. Where a binary dimension asks each prompt once and counts them alike, the test is McNemar's. Without items: spread
over calibration seeds, or the bare point.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from typing import Any

import numpy as np

from ..actors.cell import DIMENSIONS, Cell, canonical
from ..actors.evaluate.conventions import pseudo_values
from . import statistics as st
from .results import Results

#: The paper's band: a change within 5 points is no change.
BAND = 5.0
QUANTISED = ("rtn", "gptq", "awq", "smoothquant", "llm_int8", "nf4", "fp4")
PRUNED = ("magnitude", "wanda", "sparsegpt", "gblm")
Row = dict[str, Any]


@dataclass(frozen=True)
class Effect:
    """Compressed minus dense of one cell in one dimension, in points (positive is better)."""

    key: str
    dimension: str
    score: float | None
    dense: float | None
    delta: float | None
    low: float | None = None  # 95% interval; basis `seeds`: range over seeds
    high: float | None = None
    p: float | None = None  # two-sided, of "no change"
    p_holm: float | None = None  # over all cells and dimensions of the record
    q: float | None = None  # Benjamini-Hochberg, same family
    p_equivalent: float | None = None  # TOST: small means within +-5 points
    drop_upper: float | None = None  # one-sided 95% upper bound of the drop
    mde: float | None = None  # smallest difference found with 80% power
    n: int = 0  # clusters (basis items) or seeds
    basis: str = "point"  # items, seeds or point
    test: str = ""  # mcnemar, bootstrap or ""
    refusal_change: float | None = None  # share, compressed - dense
    valid: bool = True
    seed_sd: float | None = None
    seed_unstable: bool = False
    transitions: Mapping[str, int] = field(default_factory=dict)

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < 0.05

    @property
    def silenced(self) -> bool:
        """The dense model has a score here and the cell, asked the same, has none: most of its answers fell silent."""
        return self.dense is not None and self.score is None and self.refusal_change is not None

    @property
    def told(self) -> bool:
        """There is a change in points, or a score that was lost to silence."""
        return self.delta is not None or self.silenced

    @property
    def down(self) -> bool:
        """More than 5 points below dense, or silenced: a point estimate, no test."""
        return self.silenced or (self.delta is not None and self.delta < -BAND)

    def drop_shown(self, limit: float) -> bool:
        """The 95% interval lies below ``-limit`` whole: the drop is beyond it, not only estimated there."""
        return self.high is not None and self.basis == "items" and self.high < -limit


class Effects:
    """Rows of view ``results`` by key (superseded ones left out), and the effects of the compressed ones. Build it once and hand it on.

    ``pairs``: only these cells, superseded or not, each against the given other one instead of its dense cell.
    """

    def __init__(self, results: Results, pairs: Mapping[str, str] | None = None) -> None:
        from .frontier import select

        self.results = results
        rows = select(results) if pairs is None else results.rows("select * from results")
        self.rows: dict[str, Row] = {r["key"]: r for r in rows}
        self.pairs = pairs
        for row in self.rows.values():
            row["_params"] = json.loads(row["params"] or "{}")
        self.configs = [[r["key"] for r in same] for same in configurations(list(self.rows.values()))]
        self._siblings = {key: same for same in self.configs for key in same}
        #: (key, dimension) -> paired effects by cluster, points, as in `_PairedItems`
        self.contributions: dict[tuple[str, str], list[np.ndarray]] = {}
        self._build()

    # -- lookups ------------------------------------------------------------------------------------------------------

    def dense(self, key: str) -> Row | None:
        """What a cell is compared with: the dense cell of its model and evaluation, unless ``pairs`` names another."""
        other = self.rows[key]["dense_key"] if self.pairs is None else self.pairs.get(key)
        return self.rows.get(other or "")

    def of(self, key: str) -> dict[str, Effect]:
        """Effects of one cell by dimension; empty for a dense cell or one without a dense cell."""
        return self._by_key.get(key, {})

    def bases(self) -> dict[tuple[str, str], list[Row]]:
        """Rows by (model, suite): the unit of every comparison. Suites and evaluations are never mixed."""
        out: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows.values():
            out.setdefault((row["model"], row["suite"]), []).append(row)
        return dict(sorted(out.items()))

    def intervals(self, key: str) -> dict[str, st.Interval]:
        """95% interval of each dimension's own score, from the stored items; absent where there are none or the score is not
        valid."""
        out = {}
        for d in DIMENSIONS:
            parts = self.items.parts(d, key) if self.rows[key][d] is not None else None
            pseudo = parts.pseudo(parts.clusters) if parts is not None else None
            if pseudo is not None:
                out[d] = st.interval(pseudo)
        return out

    def seeds(self, key: str) -> list[str]:
        """Cells that differ from this one in the calibration seed alone, itself included."""
        return self._siblings[key]

    # -- building -----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        compared = [k for k, r in self.rows.items() if (r["method"] != "dense" or self.pairs) and self.dense(k) is not None]
        asked = self.rows if self.pairs is None else {*self.pairs, *self.pairs.values()}
        self.items = items = ItemScores(self.results, asked)
        effects: list[Effect] = []
        for dimension in DIMENSIONS:
            effects += self._dimension(dimension, compared, items)
        adjusted = st.holm([e.p for e in effects]), st.benjamini_hochberg([e.p for e in effects])
        self.all = [_with(e, p_holm=h, q=q) for e, h, q in zip(effects, *adjusted, strict=True)]
        self._by_key: dict[str, dict[str, Effect]] = {}
        for e in self.all:
            self._by_key.setdefault(e.key, {})[e.dimension] = e

    def _dimension(self, dimension: str, compared: Sequence[str], items: ItemScores) -> list[Effect]:
        out, columns, at = [], [], []
        for key in compared:
            row, dense = self.rows[key], self.dense(key)
            score, base = row[dimension], dense[dimension]
            if score is None and base is None and not row[f"{dimension}_valid"] and row[f"{dimension}_refusal"] is None:
                continue  # the dimension was not evaluated
            change = _minus(row[f"{dimension}_refusal"], dense[f"{dimension}_refusal"])
            spread = st.seed_spread([self.rows[k][dimension] for k in self.seeds(key)], BAND)
            e = Effect(
                key, dimension, score, base, _minus(score, base), refusal_change=change, valid=bool(row[f"{dimension}_valid"])
            )
            if spread:
                e = _with(e, seed_sd=spread.sd, seed_unstable=spread.unstable)
            e = _with(e, transitions=items.transitions(dimension, key, dense["key"]))
            paired = items.paired(dimension, key, dense["key"]) if e.delta is not None else None
            if paired is not None and len(paired.effects[0]) >= 2:
                self.contributions[key, dimension] = paired.effects
                e = _with(e, basis="items", n=len(paired.effects[0]), test=paired.test, p=paired.p)
                columns += paired.effects
                at += [len(out)] * len(paired.effects)
            elif spread and base is not None:
                e = _with(e, basis="seeds", n=spread.n, low=spread.low - base, high=spread.high - base)
            out.append(e)
        tests: dict[int, list[tuple[np.ndarray, st.Paired]]] = {}
        for i, d, tested in zip(at, columns, _bootstrap(columns), strict=True):
            tests.setdefault(i, []).append((d, tested))
        for i, found in tests.items():
            e, agree = out[i], len({t.diff > 0 for _, t in found}) == 1
            detectable = [st.minimum_detectable_effect(float(d.std(ddof=1)), len(d)) for d, _ in found]
            out[i] = _with(
                e,
                low=_known(min, [max(t.low, -100.0) for _, t in found]),
                high=_known(max, [min(t.high, 100.0) for _, t in found]),
                p=e.p if e.test == "mcnemar" else max(t.p for _, t in found) if agree else 1.0,
                p_equivalent=max(st.tost(d, BAND) for d, _ in found),
                drop_upper=_finite(min(100.0, max(st.upper_bound(-d, 0.95) for d, _ in found))),
                mde=_known(max, detectable),
            )
        return out

    def to_json(self) -> list[dict[str, Any]]:
        return [clean(asdict(e)) for e in self.all]


def _bootstrap(columns: Sequence[np.ndarray]) -> list[st.Paired]:
    """Paired bootstrap of many columns, those over equally many clusters in one go."""
    out: list[st.Paired | None] = [None] * len(columns)
    for g in sorted({len(c) for c in columns}):
        at = [i for i, c in enumerate(columns) if len(c) == g]
        for i, r in zip(at, st.paired_bootstrap(np.stack([columns[i] for i in at], axis=1)), strict=True):
            out[i] = r
    return [r for r in out if r is not None]


# -- items ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PairedItems:
    """``effects``: difference of each cluster [G] that both cells answered; where one answered others too, also of every cluster,
    whose mean is the change of the whole score. Each alone can hide a drop, so the weaker result of the two counts."""

    effects: list[np.ndarray]
    test: str
    p: float | None


class ItemScores:
    """Items of some cells, reduced to the parts that each dimension's formula averages."""

    def __init__(self, results: Results, keys: Iterable[str], dimensions: Sequence[str] = (*DIMENSIONS, "mmlu")) -> None:
        self._items: dict[tuple[str, str], list[Row]] = {}
        self._parts: dict[tuple[str, str], Parts | None] = {}
        targets: dict[str, Any] = {}
        table = results.sql(
            "select key, dimension, scenario, item, sample, cluster, target, outcome, score from items"
            " where key in (select unnest(?::varchar[])) and dimension in (select unnest(?::varchar[]))"
            " order by key, dimension, item, sample",
            [sorted(set(keys)), list(dimensions)],
        )
        for row in table.to_pylist():
            text = row["target"] or "{}"
            if text not in targets:
                targets[text] = json.loads(text)
            row["target"] = targets[text]
            self._items.setdefault((row["key"], row["dimension"]), []).append(row)

    def parts(self, dimension: str, key: str) -> Parts | None:
        at = (key, dimension)
        if at not in self._parts:
            rows = self._items.get(at)
            self._parts[at] = _parts(dimension, rows) if rows else None
        return self._parts[at]

    def paired(self, dimension: str, key: str, dense_key: str) -> _PairedItems | None:
        cell, dense = self.parts(dimension, key), self.parts(dimension, dense_key)
        if cell is None or dense is None:
            return None
        clusters = sorted(set(cell.clusters) & set(dense.clusters), key=str)
        if not clusters:
            return None
        a, b = cell.pseudo(clusters), dense.pseudo(clusters)
        if a is None or b is None:
            return None
        effects, p, test = [a - b], None, "bootstrap"
        every = sorted({*cell.clusters, *dense.clusters}, key=str)
        if len(every) > len(clusters):
            effects.append(cell.pseudo(every) - dense.pseudo(every))
        elif cell.once and dense.once:
            x, y = dense.once, cell.once
            lost, won = sum(x[c] > y[c] for c in clusters), sum(x[c] < y[c] for c in clusters)
            # Where scenarios of unequal size count alike, counts of prompts are not the change: they may even go the other way.
            if math.isclose(abs(won - lost) / len(clusters), abs(float(np.mean(a - b))) / 100, abs_tol=1e-9):
                p, test = st.mcnemar(lost, won), "mcnemar"
        return _PairedItems(effects, test, p)

    def one_answer(self, dimension: str, key: str) -> tuple[float, Any] | None:
        """(share, label): how many of the answers to questions with two possible labels read as the same label, whatever is asked.

        From labels and outcomes: a wrong answer is the other label. Questions are grouped by scenario, or all together where the
        whole dimension has two labels; a group counts from 8 answers on, 2 of each label. None where there is no such group.
        """
        rows = [
            r for r in self._items.get((key, dimension), ()) if r["outcome"] in ("correct", "wrong") and "label" in r["target"]
        ]
        # Of an attack that works if the answer is *not* the label nothing can be read.
        rows = [r for r in rows if r["scenario"] != "backdoor_asr"]
        groups: dict[str, list[Row]] = {}
        whole = len({str(r["target"]["label"]) for r in rows}) == 2
        for r in rows:
            groups.setdefault("" if whole else r["scenario"], []).append(r)
        given = []
        for part in groups.values():
            labels = Counter(str(r["target"]["label"]) for r in part)
            if len(labels) == 2 and len(part) >= 8 and min(labels.values()) >= 2:
                first, other = labels
                said = Counter(
                    first if (r["outcome"] == "correct") == (str(r["target"]["label"]) == first) else other for r in part
                )
                given.append((*said.most_common(1)[0], len(part)))
        if not given:
            return None
        return sum(n for _, n, _ in given) / sum(n for *_, n in given), max(given, key=lambda g: g[1])[0]

    def transitions(self, dimension: str, key: str, dense_key: str) -> dict[str, int]:
        """Also where most answers are silence and there is no score: that is where answers went."""
        cell, dense = (self._items.get((k, dimension), ()) for k in (key, dense_key))
        if not cell or not dense:
            return {}
        return st.transitions(*({(r["item"], r["sample"]): _outcome(r) for r in rows} for rows in (dense, cell)))


class Parts:
    """``cells``: name -> (cluster, value) of the answers that the formula averages there; ``combine``: their means ->
    points."""

    def __init__(self, cells: Mapping[Hashable, Sequence[tuple[Hashable, float]]], combine: Callable) -> None:
        self.cells = {name: list(pairs) for name, pairs in cells.items() if len(pairs)}
        self.combine = combine
        self.clusters = list(dict.fromkeys(c for pairs in self.cells.values() for c, _ in pairs))
        values = [(c, v) for pairs in self.cells.values() for c, v in pairs]
        binary = all(v in (0.0, 1.0) for _, v in values)
        #: cluster -> value where each prompt was asked once with a binary answer, else None
        self.once = dict(values) if binary and len(values) == len(self.clusters) else None
        self._pseudo: dict[tuple[Hashable, ...], np.ndarray | None] = {}

    def pseudo(self, clusters: Sequence[Hashable]) -> np.ndarray | None:
        """Jackknife pseudo-values of the score over ``clusters``, centred on the score itself; None if there is no score."""
        # A dense cell is asked by every cell that is compared with it, always for the same prompts.
        asked = tuple(clusters)
        if asked not in self._pseudo:
            self._pseudo[asked] = pseudo_values(self.cells, self.combine, asked)
        return self._pseudo[asked]


def _outcome(row: Row) -> str:
    """The stored outcome; an answer to a stereotype is named by what it says (score 1: it disagrees)."""
    if row["dimension"] == "stereotype" and row["outcome"] == "scored":
        return "unbiased" if row["score"] > 0.5 else "biased"
    return row["outcome"]


def _parts(dimension: str, rows: Sequence[Row]) -> Parts | None:
    from ..actors.evaluate import TASKS

    parts = TASKS[dimension].parts(rows)
    return Parts(*parts) if parts[0] else None


# -- helpers ----------------------------------------------------------------------------------------------------------


def _with(effect: Effect, **changes: Any) -> Effect:
    return replace(effect, **changes)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a - b, 9)  # 61.4 - 66.4 is no drop of more than 5


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _known(choose: Callable, values: Iterable[float]) -> float | None:
    """``min`` or ``max`` of those that are numbers; None if that is none, or infinite."""
    return _finite(choose((v for v in values if not math.isnan(v)), default=math.nan))


def clean(value: Any) -> Any:
    """JSON without NaN or infinity: they become null. Decimals (sums of SQL) become numbers."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


#: What names a cell but does not configure it.
_NAMES = ("seed", "name", "source", "published", "mislabelled")


def config_of(row: Row) -> str:
    """Everything that configures a cell but its seed: equal for calibration seeds of one configuration."""
    params = row.get("_params") or json.loads(row["params"] or "{}")
    calibration = row["calibration"] or ""  # the source as written, or a JSON block
    if calibration.startswith("{"):
        calibration = {k: v for k, v in json.loads(calibration).items() if k != "seed"}
    fields = ("model", "revision", "dtype", "evaluation", "method", "bits", "group_size", "sparsity", "pattern", "backend",
              "samples", "seqlen", "template")  # fmt: skip
    return canonical(
        {
            **{f: row[f] for f in fields},
            "params": {k: v for k, v in params.items() if k not in _NAMES},
            "calibration": calibration,
        }
    )


def configurations(rows: Sequence[Row]) -> list[list[Row]]:
    """Calibration seeds of one configuration together. A seed that stands twice was computed anew, for a repaired method or another
    text of the same name: the newest cells of each seed belong together, then those before."""
    newest = lambda i: ((t := rows[i]["finished_at"]) is not None and t.timestamp(), rows[i]["key"])
    order = sorted(range(len(rows)), key=newest, reverse=True)
    nth: Counter[tuple[str, int | None]] = Counter()
    group: dict[int, tuple[str, int]] = {}
    for i in order:
        at = config_of(rows[i]), rows[i]["seed"]
        group[i] = at[0], nth[at]
        nth[at] += 1
    out: dict[tuple[str, int], list[Row]] = {}
    for i, row in enumerate(rows):
        out.setdefault(group[i], []).append(row)
    return list(out.values())


_SIZE = re.compile(r"(?<![a-z\d.])\d+(?:\.\d+)?[bm](?![a-z])", re.I)


def family(model: str) -> str:
    """Model name without its size and revision: ``LLAMA2 13b Chat`` and ``LLAMA2 7b Chat`` are one family."""
    return " ".join(_SIZE.sub("", model.split("@")[0].replace("_", " ")).lower().split())


def label(row: Row) -> str:
    """Short name of a cell: method, rate, seed."""
    params = {k: row[k] for k in ("bits", "group_size", "pattern", "sparsity") if row[k] is not None}
    if row["method"] in (*PRUNED, "dense"):
        params.pop("bits", None)  # published pruned rows carry a nominal 8
    name = Cell.model_construct(method=row["method"], params=params).label
    return f"{name} s{row['seed']}" if row["seed"] is not None else name


def rate(row: Row) -> str:
    """The rate group of claims and plots: ``8-bit``, ``4-bit``, ``3-bit``, ``2:4``, ``50%``, ``dense``."""
    if row["method"] == "dense":
        return "dense"
    if row["method"] in QUANTISED and row["bits"]:
        return f"{row['bits']}-bit"
    if row["method"] in ("llm_int8",):
        return "8-bit"
    if row["method"] in ("nf4", "fp4"):
        return "4-bit"
    if row["pattern"] and ":" in row["pattern"]:
        return row["pattern"]
    return f"{row['sparsity']:.0%}" if row["sparsity"] else row["method"]
