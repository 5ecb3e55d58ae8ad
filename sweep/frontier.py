"""Pareto frontiers over any columns of view ``results`` and any metric: exact, with ties kept and gaps never winning.

A cell is on the frontier if no other cell is at least as good in every objective and better in one. A cell with a missing
objective is listed, is never on the frontier and dominates nothing. Probability: the share of draws in which the cell is on
the frontier, where a draw resamples the prompts (the same ones in every cell) and, among calibration seeds of one
configuration, the seed.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pat

from ..actors.cell import DIMENSIONS
from ..actors.errors import BadInput
from .results import Results

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Beyond this many rows ranks and the hypervolume say little and cost much.
_DETAIL = 20_000
_EXACT_HYPERVOLUME = (6, 1_000)  # objectives, points; above, hv_approx


@dataclass(frozen=True)
class Frontier:
    """Rows in the order of the record; ``values`` [rows, objectives] with NaN where missing."""

    minimise: list[str]
    maximise: list[str]
    keys: pa.Array
    values: np.ndarray
    on_frontier: np.ndarray  # bool [rows]
    probability: np.ndarray  # float [rows], NaN where unknown
    rank: np.ndarray | None  # int [rows], 1 is the frontier, 0 for incomplete rows; None above 20,000 rows
    hypervolume: float | None  # share of the box between the worst and the best value of each objective
    basis: str  # what the probability rests on: items, seeds, items+seeds, point or "" (not asked)
    draws: int
    where: str | None = None
    vs_small_dense: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def objectives(self) -> list[str]:
        return [*self.minimise, *self.maximise]

    def frontier_keys(self) -> list[str]:
        return self.keys.filter(pa.array(self.on_frontier)).to_pylist()

    def rows(self, frontier_only: bool = False) -> list[dict[str, Any]]:
        """One dict a row: key, objectives, on_frontier, probability, rank, vs_small_dense (None: no smaller dense model)."""
        at = np.flatnonzero(self.on_frontier) if frontier_only else np.arange(len(self.keys))
        keys = self.keys.take(pa.array(at)).to_pylist()
        out = []
        for key, i, values in zip(keys, at.tolist(), self.values[at].tolist(), strict=True):
            row: dict[str, Any] = {"key": key}
            for name, v in zip(self.objectives, values, strict=True):
                row[name] = v if math.isfinite(v) else None
            p = float(self.probability[i])
            row["on_frontier"] = bool(self.on_frontier[i])
            row["probability"] = None if math.isnan(p) else p
            row["rank"] = None if self.rank is None else (int(self.rank[i]) or None)
            row["vs_small_dense"] = self.vs_small_dense.get(key)
            out.append(row)
        return out

    def to_json(self) -> dict[str, Any]:
        """Stable form; documented in docs/decisions.md."""
        return {
            "objectives": self.objectives,
            "minimise": self.minimise,
            "maximise": self.maximise,
            "where": self.where,
            "basis": self.basis,
            "draws": self.draws,
            "hypervolume": self.hypervolume,
            "rows": self.rows(),
        }

    def dumps(self) -> str:
        """``to_json`` as text, a row a line; in Arrow by columns, since a million dicts take longer than the frontier."""
        import pyarrow.compute as pc

        head = {k: v for k, v in replace(self, keys=self.keys[:0], values=self.values[:0]).to_json().items() if k != "rows"}
        keys = self.keys.to_pylist()
        columns: dict[str, Any] = {"key": pa.array(map(json.dumps, keys), pa.string())}
        columns |= {n: _numbers(v) for n, v in zip(self.objectives, self.values.T, strict=True)}
        columns["on_frontier"] = pa.array(self.on_frontier).cast(pa.string())
        columns["probability"] = _numbers(self.probability)
        columns["rank"] = "null" if self.rank is None else _numbers(np.where(self.rank > 0, self.rank, np.nan))
        small = self.vs_small_dense
        columns["vs_small_dense"] = pa.array([json.dumps(small.get(k)) for k in keys], pa.string()) if small else "null"
        parts: list[Any] = []
        for name, column in columns.items():
            parts += [f"{', ' if parts else '{'}{json.dumps(name)}: ", column]
        rows = ",\n  ".join(pc.binary_join_element_wise(*parts, "}", "").to_pylist())
        return json.dumps(head)[:-1] + f', "rows": [\n  {rows}\n]}}'

    def to_csv(self) -> str:
        """``key``, the objectives, ``on_frontier``, ``probability``, ``rank``; missing values are empty."""
        from pyarrow import csv

        columns = {"key": self.keys}
        columns |= {n: pa.array(v, from_pandas=True) for n, v in zip(self.objectives, self.values.T, strict=True)}
        columns |= {"on_frontier": pa.array(self.on_frontier), "probability": pa.array(self.probability, from_pandas=True)}
        ranks = np.zeros(len(self.keys), int) if self.rank is None else self.rank
        columns["rank"] = pa.array(ranks, mask=ranks == 0)
        out = io.BytesIO()
        csv.write_csv(pa.table(columns), out)
        return out.getvalue().decode()


def _numbers(values: np.ndarray) -> pa.Array:
    """JSON texts of numbers, null where there is none."""
    finite = np.isfinite(values)
    return pa.array(values, pa.float64(), mask=~finite).cast(pa.string()).fill_null("null")


def pareto(
    results: Results,
    minimise: str | Sequence[str] = (),
    maximise: str | Sequence[str] = (),
    where: str | None = None,
    probability: bool = True,
    draws: int = 1000,
    seed: int = 0,
) -> Frontier:
    """The frontier over ``minimise`` and ``maximise``: columns of view ``results``, or metrics by name (``dimension.metric``
    if the name alone is not unique), among the rows that fulfil the SQL condition ``where``.

    ``BadInput``: no objective, one named twice, unknown (with the nearest name) or not a number; no data; no row left by
    ``where``; failed cells only; cells that were asked different questions.
    """
    minimise, maximise = ([names] if isinstance(names, str) else list(names) for names in (minimise, maximise))
    objectives = [*minimise, *maximise]
    _check_objectives(minimise, maximise)
    table = select_table(results, ["key", "suite", "evaluation", *objectives], where)
    asked, table = table.select(["suite", "evaluation"]), table.drop_columns(["suite", "evaluation"])
    values = np.column_stack([_floats(table.column(i + 1), name) for i, name in enumerate(objectives)])
    for name, column in zip(objectives, values.T, strict=True):
        if np.isnan(column).all():
            raise BadInput(
                f"{name} has no data in the {len(values)} cells", where=_option(name, minimise), fix=_with_data(results)
            )
    complete = ~np.isnan(values).any(axis=1)
    if not complete.any():
        raise BadInput("no cell has a value in every objective", where="--min/--max", fix="Drop one, or evaluate more.")
    _check_one_evaluation(asked.filter(pa.array(complete)))
    up = [name in maximise for name in objectives]
    on = nondominated(values, up)
    keys = table.column(0).combine_chunks()
    chance, basis = np.full(len(values), np.nan), ""
    if probability:
        chance[complete], basis = _probability(
            results, keys.filter(pa.array(complete)).to_pylist(), objectives, values[complete], up, draws, seed
        )
    detail = len(values) <= _DETAIL
    return Frontier(
        minimise,
        maximise,
        keys,
        values,
        on,
        chance,
        _ranks(values, complete, up) if detail else None,
        _hypervolume(values[complete], on[complete], up) if detail else None,
        basis,
        draws if probability else 0,
        where,
        small_dense(results, keys.to_pylist(), objectives, values, up) if detail else {},
    )


def nondominated(values: np.ndarray, up: Sequence[bool]) -> np.ndarray:
    """Which rows of ``values`` [rows, objectives] no other row dominates: bool [rows]; equal rows stand or fall together.

    A row with a missing value (NaN) is not on the frontier and takes no part: given to moocore it would dominate everything.
    Infinite values give wrong answers there, or a crash (moocore 0.3.2): such a column is compared by ranks instead.
    """
    import moocore

    complete = ~np.isnan(values).any(axis=1)
    on = np.zeros(len(values), bool)
    if complete.any():
        on[complete] = moocore.is_nondominated(_without_infinity(values[complete]), maximise=list(up), keep_weakly=True)
    return on


def _without_infinity(values: np.ndarray) -> np.ndarray:
    infinite = np.isinf(values).any(axis=0)
    if not infinite.any():
        return values
    out = values.copy()
    for j in np.flatnonzero(infinite):
        out[:, j] = np.unique(values[:, j], return_inverse=True)[1]
    return out


# -- choosing rows and columns ----------------------------------------------------------------------------------------


def _check_one_evaluation(table: pa.Table) -> None:
    """Scores of different items do not compare. ``table``: suite and evaluation of each row."""
    asked = sorted({(r["suite"] or "", r["evaluation"] or "") for r in table.to_pylist()})
    if len(asked) > 1:
        suites = sorted({suite for suite, _ in asked})
        one = f"suite = '{suites[-1]}'" if len(suites) > 1 else f"evaluation = '{asked[0][1]}'"
        raise BadInput(
            f"these cells were evaluated in {len(asked)} ways ({', '.join(f'{s} {e[:8]}'.strip() for s, e in asked)}), "
            f"whose scores do not compare",
            where="--where",
            fix=f'Choose one: --where "{one}".',
        )


def _check_objectives(minimise: Sequence[str], maximise: Sequence[str]) -> None:
    if not minimise and not maximise:
        raise BadInput("no objective", where="--min/--max", fix="Give at least one: --min size_bytes --max trust.")
    if both := set(minimise) & set(maximise):
        raise BadInput(f"{sorted(both)[0]} cannot be minimised and maximised", where="--min/--max", fix="Keep one of the two.")
    for name in (*minimise, *maximise):
        if [*minimise, *maximise].count(name) > 1:
            raise BadInput(f"{name} is given twice", where="--min/--max")


def _option(name: str, minimise: Sequence[str]) -> str:
    return f"{'--min' if name in minimise else '--max'} {name}"


def select_table(results: Results, columns: Sequence[str] | None, where: str | None) -> pa.Table:
    """``columns`` (None: all) of view ``results`` under ``where``, without superseded cells; a column may also name a metric that the
    view does not have.

    ``BadInput`` if a name is unknown, the condition does not run, no row is left, or the record holds failed cells only.
    """
    known = results.columns
    extra = [c for c in columns or () if c not in known]
    source = "results"
    if extra:
        joins = []
        for i, name in enumerate(extra):
            dimension, metric = _metric(results, name, known)
            value = f"select key, max(value) as {_column(name)} from metrics where convention = 'comptrust' and scenario = ''"
            fits = f"dimension = '{_quote(dimension)}' and metric = '{_quote(metric)}'"
            joins.append(f"left join ({value} and {fits} group by key) m{i} using (key)")
        source = f"(select * from results {' '.join(joins)})"
    chosen = "*" if columns is None else ", ".join(map(_column, columns))
    query = f"select {chosen} from {source} where not superseded"
    if not where:
        table = results.sql(query)
    else:
        try:
            table = results.sql(f"{query} and ({where})")
        except BadInput as e:
            problem = e.problem.partition("\n")[0]
            raise BadInput(f"{where!r} does not run: {problem}", where="--where", fix=_nearest_in(problem, known)) from e
    if table.num_rows == 0:
        _explain_empty(results, where)
    return table


def select(results: Results, columns: Sequence[str] | None = None, where: str | None = None) -> list[dict[str, Any]]:
    return select_table(results, columns, where).to_pylist()


def _quote(text: str) -> str:
    return text.replace("'", "''")


def _column(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _metric(results: Results, name: str, known: Sequence[str]) -> tuple[str, str]:
    """(dimension, metric) of an objective that is no column of the view."""
    found = results.rows("select distinct dimension, metric from metrics where convention = 'comptrust' and scenario = ''")
    metrics = [(r["dimension"], r["metric"]) for r in found]
    fits = [m for m in metrics if name in (m[1], f"{m[0]}.{m[1]}")]
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = ", ".join(sorted(f"{d}.{m}" for d, m in fits))
        raise BadInput(f"{name!r} is ambiguous", where="--min/--max", fix=f"One of: {names}.")
    unique = {m for _, m in metrics if sum(m == other for _, other in metrics) == 1}
    near = difflib.get_close_matches(name, sorted({*known, *unique, *(f"{d}.{m}" for d, m in metrics)}), 3, 0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else 'List the columns: comptrust query RESULTS "describe results".'
    raise BadInput(f"unknown column {name!r}", where="--min/--max", fix=hint)


def _nearest_in(problem: str, known: Sequence[str]) -> str:
    named = re.search(r'column "([^"]+)"', problem)
    near = difflib.get_close_matches(named[1], known, 1, 0.4) if named else []
    return f"Did you mean {near[0]}?" if near else "Give SQL over columns of results, such as: bits <= 4 and mmlu > 50."


def _explain_empty(results: Results, where: str | None) -> None:
    cells = results.rows("select count(*) as n from results")[0]["n"]
    if cells:
        fix = "The conditions exclude each other or are too strict."
        raise BadInput(f"none of {cells} cells fulfils {where!r}", where="--where", fix=fix)
    failed = results.rows("select method, error_type, error from failed limit 3")
    if failed:
        n = results.rows("select count(*) as n from failed")[0]["n"]
        lines = [f"{f['method']}: {f['error_type']}: {(f['error'] or '').strip().partition(chr(10))[0][:120]}" for f in failed]
        fix = "See comptrust status RESULTS, then run the sweep again."
        raise BadInput(f"all {n} cells failed ({'; '.join(lines)})", where="RESULTS", fix=fix)
    raise BadInput("no finished cell yet", where="RESULTS", fix="Run the sweep again: it continues where it stopped.")


def _floats(column: pa.ChunkedArray, name: str) -> np.ndarray:
    kind = column.type
    if not (pat.is_integer(kind) or pat.is_floating(kind) or pat.is_boolean(kind) or pat.is_decimal(kind) or pat.is_null(kind)):
        raise BadInput(f"{name} is {kind}, not a number", where="--min/--max", fix="Objectives are numeric columns.")
    return column.cast(pa.float64()).to_numpy()


def _with_data(results: Results) -> str:
    names = ["mmlu", "perplexity", "trust", *DIMENSIONS, "bits", "size_bytes", "bits_per_weight"]
    counts = results.rows("select " + ", ".join(f"count({n}) as {n}" for n in names) + " from results")[0]
    return f"With data: {', '.join(n for n in names if counts[n]) or 'none'}."


# -- figures of the whole ------------------------------------------------------------------------------------------------


def _ranks(values: np.ndarray, complete: np.ndarray, up: Sequence[bool]) -> np.ndarray:
    import moocore

    rank = np.zeros(len(values), int)
    # Equal rows share a rank: pareto_rank breaks ties by order, so it sees each distinct row once.
    distinct, inverse = np.unique(_without_infinity(values[complete]), axis=0, return_inverse=True)
    if len(up) == 1:  # moocore 0.3.2 ranks a single objective as if more were better, whatever it is told
        ranks = np.arange(len(distinct))[:: -1 if up[0] else 1]
    else:
        ranks = np.asarray(moocore.pareto_rank(distinct, maximise=list(up)))
    rank[complete] = ranks[inverse.ravel()] + 1
    return rank


def _hypervolume(values: np.ndarray, on: np.ndarray, up: Sequence[bool]) -> float | None:
    """Dominated share of the box from the worst to the best finite value of each objective; None with infinite values."""
    import moocore

    if not np.isfinite(values).all():
        return None
    cost = np.where(up, -values, values)
    low, span = cost.min(axis=0), np.ptp(cost, axis=0)
    scaled = (cost - low) / np.where(span > 0, span, 1)
    points = np.unique(scaled[on], axis=0)
    exact = points.shape[1] <= _EXACT_HYPERVOLUME[0] and len(points) <= _EXACT_HYPERVOLUME[1]
    ref = np.ones(points.shape[1])
    if points.shape[1] == 1:
        return float(1 - points.min())
    return float(moocore.hypervolume(points, ref=ref) if exact else moocore.hv_approx(points, ref=ref, seed=0))


# -- the smaller dense model --------------------------------------------------------------------------------------------


def smaller_dense(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Compressed cell -> the largest dense cell of its family with fewer parameters than its own model, same evaluation."""
    from .effects import family

    families = {m: family(m) for m in {r["model"] for r in rows}}
    dense = {r["key"]: r for r in rows if r["method"] == "dense" and r["parameters"]}
    relatives: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for d in dense.values():
        relatives.setdefault((d["evaluation"], families[d["model"]]), []).append(d)
    out = {}
    for row in rows:
        if row["method"] == "dense" or not row["parameters"]:
            continue
        own = dense.get(row["dense_key"], row)["parameters"]
        fits = [d for d in relatives.get((row["evaluation"], families[row["model"]]), ()) if d["parameters"] < own]
        if fits:
            out[row["key"]] = max(fits, key=lambda d: d["parameters"])["key"]
    return out


def small_dense(
    results: Results, keys: Sequence[str], objectives: Sequence[str], values: np.ndarray, up: Sequence[bool]
) -> dict[str, dict[str, Any]]:
    """Each compressed cell against its smaller dense model over the objectives: which are better, worse, and the verdict."""
    chosen = ["key", "model", "method", "parameters", "evaluation", "dense_key"]
    rows = select(results, chosen)
    pairs = {k: v for k, v in smaller_dense(rows).items() if k in set(keys)}
    if not pairs:
        return {}
    at = {k: i for i, k in enumerate(keys)}
    models = {r["key"]: r["model"] for r in rows}
    outside = [k for k in set(pairs.values()) if k not in at]
    others = {}
    if outside:  # `where` may have left the small dense cell out of the frontier; it still is the yardstick
        table = select_table(results, ["key", *objectives], None)
        matrix = np.column_stack([_floats(table.column(i + 1), n) for i, n in enumerate(objectives)])
        others = dict(zip(table.column(0).to_pylist(), matrix, strict=True))
    out = {}
    for key, small in pairs.items():
        a, b = values[at[key]], values[at[small]] if small in at else others[small]
        gain = np.where(up, a - b, b - a)
        better = [n for n, g in zip(objectives, gain, strict=True) if g > 0]
        worse = [n for n, g in zip(objectives, gain, strict=True) if g < 0]
        verdict = (
            "dominates" if better and not worse else "dominated" if worse and not better else "mixed" if better else "equal"
        )
        if np.isnan(gain).any():
            verdict = "unknown"
        out[key] = {"key": small, "model": models[small], "better": better, "worse": worse, "verdict": verdict}
    return out


# -- probability --------------------------------------------------------------------------------------------------------


def _probability(
    results: Results,
    keys: Sequence[str],
    objectives: Sequence[str],
    values: np.ndarray,
    up: Sequence[bool],
    draws: int,
    seed: int,
) -> tuple[np.ndarray, str]:
    """(share of draws on the frontier [rows], NaN for cells without any uncertainty of their own; basis)."""
    from .resampling import Resampler

    sampler = Resampler(results, keys, objectives, seed)
    if not sampler.basis:
        return np.full(len(keys), np.nan), "point"
    hits = np.zeros(len(keys))
    for drawn in sampler.draw(values, draws):
        hits += nondominated(drawn, up)
    return np.where(sampler.uncertain, hits / draws, np.nan), sampler.basis


# -- terminal ----------------------------------------------------------------------------------------------------------


def render_frontier(frontier: Frontier, results: Results, console: Console, limit: int = 40) -> None:
    """Table of the frontier (not of what is dominated) and a scatter plot of its first two objectives."""
    from rich.markup import escape
    from rich.table import Table

    from .effects import label
    from .names import distinct

    best = frontier.maximise[0] if frontier.maximise else frontier.minimise[0]
    shown = sorted(frontier.rows(frontier_only=True), key=lambda r: r[best], reverse=bool(frontier.maximise))[:limit]
    keys = [r["key"] for r in shown]
    cells = {
        r["key"]: r
        for r in results.rows(
            "select * from results where key in (select unnest(?::varchar[]))",
            [keys],
        )
    }
    names = dict(zip(cells, distinct(list(cells.values()), [label(c) for c in cells.values()]), strict=True))
    found = int(frontier.on_frontier.sum())
    total, complete = len(frontier.keys), int((~np.isnan(frontier.values).any(axis=1)).sum())
    title = f"Frontier: {found} of {total} cells" + (f", the first {limit} by {best}" if found > limit else "")
    table = Table(title=title, caption=_caption(frontier, total - complete))
    table.add_column("cell", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("what", no_wrap=True)
    heads = [f"{name} {'min' if name in frontier.minimise else 'max'}" for name in frontier.objectives]
    heads += ["probability"] if frontier.basis else []
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    small = any(r["vs_small_dense"] for r in shown)
    if small:
        table.add_column("vs small dense", overflow="fold")
    lines = []
    for row in shown:
        cell = cells[row["key"]]
        line = [row["key"][:8], cell["model"], names[row["key"]], *(number(row[n]) for n in frontier.objectives)]
        if frontier.basis:
            line.append("-" if row["probability"] is None else f"{row['probability']:.2f}")
        if small:
            v = row["vs_small_dense"]
            line.append(f"{v['verdict']} ({v['model']})" if v else "")
        lines.append(line)
        table.add_row(*map(escape, line))
    drawn = "".join(s.text for line in console.render_lines(table) for s in line)
    if all(value in drawn for line in lines for value in line[2 : 3 + len(heads)]):
        console.print(table)
    else:  # columns too narrow for their numbers would cut them
        console.print(title, markup=False)
        for key, model, what, *values in lines:
            known = [f"{head} {value}" for head, value in zip([*heads, "vs small dense"], values, strict=False) if value]
            console.print(f"[bold]{key}[/] {escape(' · '.join([model, what, *known]))}", highlight=False)
        console.print(table.caption, markup=False)
    if len(frontier.objectives) >= 2 and complete >= 3 and total <= _DETAIL:
        console.print(_scatter(frontier, console.width), markup=False, highlight=False)


def _caption(frontier: Frontier, incomplete: int) -> str:
    parts = []
    if frontier.hypervolume is not None:
        parts.append(f"hypervolume {frontier.hypervolume:.3f} of the observed box")
    if incomplete:
        parts.append(f"{incomplete} cells lack an objective and stand aside")
    if frontier.basis == "point":
        parts.append("no items and no seeds: probabilities unknown")
    elif frontier.basis:
        parts.append(f"probability over {frontier.draws} draws of {frontier.basis}")
    return "; ".join(parts)


def _scatter(frontier: Frontier, width: int) -> str:
    import plotext

    x, y = frontier.values[:, 0], frontier.values[:, 1]
    there = ~np.isnan(frontier.values).any(axis=1) & np.isfinite(x) & np.isfinite(y)
    figure = plotext.figure
    figure.clear()
    figure.plot_size(min(width, 90), 18)
    figure.title(f"{frontier.objectives[1]} (up) over {frontier.objectives[0]}: x frontier, \u00b7 dominated")
    for chosen, marker in ((there & ~frontier.on_frontier, "\u00b7"), (there & frontier.on_frontier, "x")):
        if chosen.any():
            figure.draw(figure.signal(x[chosen].tolist(), y[chosen].tolist(), marker=marker))
    return figure.build().string(True)


def filled_table(columns: Mapping[str, str], rows: Sequence[Sequence[str]], **options: Any) -> Table:
    """Table of markup, without the columns that hold nothing ("" or "-") in any row. ``columns``: name -> justification."""
    from rich.table import Table

    table = Table(**options)
    kept = [i for i in range(len(columns)) if any(row[i] not in ("", "-") for row in rows)]
    for i, (name, justify) in enumerate(columns.items()):
        if i in kept:
            table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    return table


def number(value: float | None) -> str:
    if value is None:
        return "-"
    if abs(value) >= 1e9:
        return f"{value / 1e9:.2f}G"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.1f}M"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
