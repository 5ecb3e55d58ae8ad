"""One cell against another (its dense cell by default): paired tests, transitions, divergence, layer errors, cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..actors.cell import DIMENSIONS
from ..actors.errors import BadInput
from .effects import Effect, Effects, clean, label
from .names import asked
from .results import Results

if TYPE_CHECKING:
    from rich.console import Console

COSTS = (
    "size_bytes",
    "bits_per_weight",
    "sparsity_reached",
    "peak_memory_bytes",
    "prefill_tokens_s",
    "decode_tokens_s",
    "compress_s",
    "evaluate_s",
)
UTILITY = ("perplexity", "mmlu", "trust", "kl_dense", "top1_agreement", "flips")


@dataclass(frozen=True)
class Comparison:
    """``effects``: cell minus other, adjusted over the dimensions of this comparison alone."""

    key: str
    to: str
    model: str
    cell: str
    other: str
    suite: str
    effects: list[Effect]
    utility: dict[str, tuple[float | None, float | None]]  # name -> (cell, other)
    cost: dict[str, tuple[float | None, float | None]]
    layers: list[dict[str, Any]]  # layer, error, sparsity, bits; largest error first

    def to_json(self) -> dict[str, Any]:
        """Stable form; documented in docs/decisions.md."""
        out = asdict(self)
        for part in ("utility", "cost"):
            out[part] = {k: {"cell": a, "other": b} for k, (a, b) in out[part].items()}
        return clean(out)


def compare(results: Results, cell: str, to: str | None = None) -> Comparison:
    """``cell`` and ``to`` are keys or unambiguous prefixes; ``to`` defaults to the dense cell of the same model and evaluation.

    ``BadInput``: no such cell, no dense cell, or two cells of different evaluations (suites are never mixed).
    """
    key = results.find(cell)
    rows = {r["key"]: r for r in results.rows("select * from results where key = ?", [key])}
    other = results.find(to) if to is not None else rows[key]["dense_key"]
    if other is None:
        raise BadInput(
            "has no dense cell to compare with", where=f"CELL {key[:8]}", fix="Run the dense cell, or name another with --to."
        )
    if other == key:
        why = "is the dense cell itself" if to is None else "is the same cell"
        raise BadInput(why, where=f"CELL {key[:8]}", fix="Name another cell with --to.")
    rows |= {r["key"]: r for r in results.rows("select * from results where key = ?", [other])}
    a, b = rows[key], rows[other]
    if a["evaluation"] != b["evaluation"]:
        raise BadInput(
            f"evaluated differently ({' and '.join(asked([a, b]))}): no common items",
            where="--to",
            fix="Compare cells of one suite and data pack.",
        )
    effects = Effects(results, pairs={key: other})
    return Comparison(
        key,
        other,
        a["model"],
        label(a),
        label(b) if b["model"] == a["model"] else f"{b['model']} {label(b)}",
        a["suite"],
        [e for d in DIMENSIONS if (e := effects.of(key).get(d))],
        {n: (a[n], b[n]) for n in UTILITY if a[n] is not None or b[n] is not None} | _other_metrics(results, key, other),
        {n: (a[n], b[n]) for n in COSTS if a[n] is not None or b[n] is not None},
        results.rows(
            "select layer, error, sparsity, bits from layers where key = ? order by error desc nulls last, layer", [key]
        ),
    )


def _other_metrics(results: Results, key: str, other: str) -> dict[str, tuple[float | None, float | None]]:
    """Metrics outside the eight dimensions and the view: lm_eval tasks (of their scenario), columns of published tables."""
    rows = results.rows(
        "select concat_ws(' ', nullif(scenario, ''), metric) as name, max(value) filter (where key = ?) as cell,"
        " max(value) filter (where key = ?) as other from metrics"
        " where key in (?, ?) and convention = 'comptrust' and value is not null and case when scenario = ''"
        " then dimension not in (select unnest(?::varchar[])) and metric not in (select unnest(?::varchar[]))"
        " else dimension = 'utility' and metric != 'mmlu_accuracy' end"
        " group by name order by name",
        [key, other, key, other, list(DIMENSIONS), list(UTILITY)],
    )
    return {r["name"]: (r["cell"], r["other"]) for r in rows}


# -- terminal ----------------------------------------------------------------------------------------------------------------


def render_comparison(found: Comparison, console: Console, layers: int = 8) -> None:
    from rich.markup import escape
    from rich.table import Table

    from .frontier import filled_table, number

    title = f"{found.model}: {found.cell} ({found.key[:8]}) against {found.other} ({found.to[:8]}), {found.suite}"
    if found.effects:
        rows = [_effect(e) for e in found.effects]
        table = filled_table(_COLUMNS, rows, title=escape(title))
        if console.measure(table, options=console.options.update(width=1_000)).minimum <= console.width:
            console.print(table)
        else:  # columns too narrow for their numbers would cut them
            console.print(title, markup=False)
            for dimension, *values in rows:
                known = [
                    f"{name} {value}" for name, value in zip(list(_COLUMNS)[1:], values, strict=True) if value not in ("", "-")
                ]
                console.print(f"[bold]{dimension}[/]: {' · '.join(known)}", highlight=False)
    else:
        console.print(f"{title}: no trust dimension was evaluated", markup=False)
    pairs = Table(title="Utility, divergence, cost")
    for name in ("", "cell", "other", "ratio"):
        pairs.add_column(name, justify="left" if not name else "right")
    for name, (a, b) in {**found.utility, **found.cost}.items():
        pairs.add_row(name, number(a), number(b), f"{a / b:.3f}" if a is not None and b else "")
    console.print(pairs)
    known = [r for r in found.layers if r["error"] is not None]
    if known:
        console.print(f"Layer errors ||(W-W')X||/||WX||, {len(known)} layers, largest {min(layers, len(known))}:")
        top = known[0]["error"] or 1.0
        for r in known[:layers]:
            bar = "\u2588" * max(1, round(24 * r["error"] / top)) if r["error"] > 0 else ""
            console.print(f"  {r['layer']:<44} {r['error']:.4f} {bar}", markup=False, highlight=False)


_COLUMNS: Mapping[str, str] = {
    "dimension": "left",
    "cell": "right",
    "other": "right",
    "change": "right",
    "95%": "right",
    "over seeds": "right",
    "p (Holm)": "right",
    "within 5 (TOST)": "right",
    "detectable": "right",
    "n": "right",
    "test": "left",
    "refusal": "right",
    "transitions": "left",
}


def _effect(e: Effect) -> list[str]:
    def show(value: float | None, form: str = "+.1f") -> str:
        return "-" if value is None else format(value, form)

    interval = "-" if e.low is None or e.high is None else f"{e.low:+.1f} to {e.high:+.1f}"
    change = show(e.delta)
    if e.significant:
        change = f"[{'red' if (e.delta or 0) < 0 else 'green'}]{change}[/]"
    refusal = "-" if e.refusal_change is None else f"{100 * e.refusal_change:+.0f}"
    values = [
        "silent" if e.silenced else show(e.score, ".1f"),
        show(e.dense, ".1f"),
        change,
        *(("-", interval) if e.basis == "seeds" else (interval, "-")),
        show(e.p_holm, ".3g"),
        show(e.p_equivalent, ".3g"),
        show(e.mde, ".1f"),
    ]
    return [e.dimension, *values, str(e.n or "-"), e.test or e.basis, refusal, _moves(e.transitions)]


_SHOWN: Mapping[str, str] = {
    "right_to_wrong": "right\u2192wrong",
    "wrong_to_right": "wrong\u2192right",
    "answered_to_refused": "answered\u2192refused",
    "refused_to_answered": "refused\u2192answered",
    "answered_to_silent": "answered\u2192silent",
    "unbiased_to_biased": "unbiased\u2192biased",
    "biased_to_unbiased": "biased\u2192unbiased",
}


def _moves(transitions: Mapping[str, int]) -> str:
    return ", ".join(f"{text} {transitions[name]}" for name, text in _SHOWN.items() if transitions.get(name))
