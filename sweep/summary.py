"""What the commands print on a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from rich.console import Console
from rich.table import Table

from ..actors.cell import DIMENSIONS


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
    return str(value)


def print_rows(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Rows as a table, one column a key; where so many columns don't fit, one block a row."""
    if not rows:
        console.print("no rows")
        return
    if sum(max(len(name), 3) + 1 for name in rows[0]) > console.width:
        for i, row in enumerate(rows, 1):
            console.rule(f"{i} of {len(rows)}", align="left")
            block = Table(box=None, show_header=False, pad_edge=False)
            for name, value in row.items():
                block.add_row(f"[bold]{escape(name)}[/]", escape(_text(value)))
            console.print(block)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, value in rows[0].items():
        numeric = all(isinstance(r[name], int | float | Decimal | type(None)) and not isinstance(r[name], bool) for r in rows)
        table.add_column(escape(name), justify="right" if numeric and value is not None else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_text(v)) for v in row.values()))
    console.print(table)


def escape(text: str) -> str:
    """Text of models and files, inert for rich's markup and for the terminal."""
    from rich.markup import escape as markup

    return markup("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text))


def stage(worker: Mapping[str, Any]) -> str:
    """What a worker does, with a count where there is one."""
    return f"{worker['stage']} {worker['done']}/{worker['total']}" if worker["total"] > 1 else worker["stage"]


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    console.print(
        f"[bold]{plan['sweep']}[/]: {plan['cells']} cells, {plan['done']} done · suite {plan['suite']} of {escape(plan['data'])}"
        f" · results {escape(plan['results'])}"
    )
    if plan["note"]:
        console.print(plan["note"], style="yellow", markup=False)
    print_rows(plan["models"], console)
    table = Table(box=None, header_style="bold", pad_edge=False, title="cells", title_justify="left")
    for name in ("key", "model", "cell", ""):
        table.add_column(name)
    for c in plan["list"]:
        table.add_row((c["key"] or "-")[:8], escape(c["model"]), escape(c["cell"]), "[green]done[/]" if c["done"] else "")
    console.print(table)
    for s in plan["skipped"]:
        console.print(f"impossible: {s['model']} {s['label']}: {s['reason']}", style="yellow", markup=False)
    for a in plan["absent"]:
        console.print(f"not measured: {a}", style="yellow", markup=False)
    console.print(
        f"about {plan['gpu_hours']:g} GPU hours on H100-class GPUs and {plan['disk_gb']:g} GB of disk, from shapes alone"
    )


def print_status(status: Mapping[str, Any], console: Console) -> None:
    console.print(f"[bold]{escape(status['results'])}[/]: {status['cells']} cells recorded")
    for s in status["sweeps"]:
        state = (
            "[green]running[/]"
            if s["running"]
            else "complete"
            if s["left"] == 0 and not s["failed"]
            else "[yellow]not running[/]"
        )
        console.print(
            f"{escape(s['name'])} ({s['sweep']}): {s['done']} done, {s['failed']} failed, {s['left']} left of {s['total']} · {state}"
        )
        if s["cells_per_hour"]:
            console.print(f"  {s['cells_per_hour']:.1f} cells/hour, about {s['left_s'] / 60:.0f} min left")
        for w in s["workers"]:
            console.print(escape(f"  worker {w['id']}: {w['label']}: {stage(w)}"))
        for f in s["failures"]:
            console.print(
                escape(f"  failed {f['label']} (attempt {f['attempts']}): {f['error_type']}: {f['error'][:300]}"), style="red"
            )


def print_doctor(found: Mapping[str, Any], console: Console) -> None:
    console.print(f"Python {found['python']} on {found['platform']}, {found['cpus']} CPUs")
    for g in found["gpus"]:
        console.print(f"GPU {g['name']}, {g['memory_gb']} GB, capability {g['capability']}")
    if not found["gpus"]:
        console.print("no GPU: cells run on CPU workers")
    print_rows([{"package": k, "version": v or "not installed"} for k, v in found["packages"].items()], console)
    print_rows([{"variable": k, "set": v} for k, v in found["environment"].items()], console)
    console.print(f"cache {found['cache']}, {found['disk_free_gb']} GB free")


def _score(value: float | None) -> str:
    return "invalid" if value is None else f"{value:.1f}"


def print_metrics(metrics: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Dimensions of one model: score, interval, refusal; then utility."""
    ours = [m for m in metrics if m["convention"] == "comptrust" and not m["scenario"]]
    by = {(m["dimension"], m["metric"]): m for m in ours}
    rows = []
    for d in DIMENSIONS:
        score = by.get((d, "score"))
        if score is None:
            continue
        low, high = score["ci_low"], score["ci_high"]
        refusal = by.get((d, "refusal"))
        rows.append(
            {
                "dimension": d,
                "score": _score(score["value"]),
                **({"dense": _score(score["dense"])} if "dense" in score else {}),
                "95% interval": f"{low:.1f} - {high:.1f}" if low is not None and high is not None else "-",
                "refused": f"{refusal['value']:.0%}" if refusal and refusal["value"] is not None else "-",
                "n": score["n"],
            }
        )
    print_rows(rows, console)
    print_rows(
        [
            {k: m[k] for k in ("metric", "value", "dense", "n") if k in m}
            for m in ours
            if m["dimension"] in ("utility", "divergence")
        ],
        console,
    )


def print_summary(outcome: Any, console: Console) -> None:
    """The end of a sweep: counts, frontier, where to look next."""
    from ..actors.errors import BadInput
    from .results import load_results

    how = "interrupted" if outcome.interrupted else "done"
    console.print(
        f"\n[bold]{how}[/]: {outcome.done} of {outcome.total} cells, {outcome.failed} failed, {outcome.skipped} impossible,"
        f" {outcome.seconds:.0f} s, {outcome.loads} model load(s)"
    )
    if outcome.stages:
        console.print("time: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in outcome.stages.items()))
    if outcome.interrupted:
        console.print("the same command goes on where this stopped")
        return
    try:
        results = load_results(outcome.results)
        keys = next((s["keys"] for s in results.record.sweeps() if s["id"] == outcome.sweep), [])
        rows = results.rows(
            "select left(key, 8) as key, model, suite, method, bits, pattern, sparsity, perplexity, round(size_bytes / 1e6, 1) as MB,"
            " bits_per_weight, worst_drop, kl_dense, flips from results where key in (select unnest(?::varchar[]))"
            " order by perplexity nulls last limit 40",
            [keys],
        )
        same = [c for c in ("model", "suite") if len({r[c] for r in rows}) == 1]
        rows = [{k: v for k, v in r.items() if k not in same} for r in rows]
    except BadInput:
        return
    print_rows(rows, console)
    _frontier(results, keys, console)
    place = shlex.quote(outcome.results)
    console.print(
        f"\nnext: comptrust recommend {place}   comptrust report {place} -o report.html\n"
        f'      comptrust query {place} "select method, bits, trust, worst_drop from results"\n'
        f"      comptrust status {place}",
        highlight=False,
        markup=False,
    )


def _frontier(results: Any, keys: Sequence[str], console: Console) -> None:
    """Size against perplexity of the sweep's own cells: plot and table."""
    from ..actors.errors import BadInput
    from .frontier import pareto, render_frontier

    try:
        mine = "key in (" + ", ".join(f"'{k}'" for k in keys) + ")"
        answer = pareto(results, minimise=["size_bytes", "perplexity"], maximise=[], where=mine, probability=False)
    except BadInput as e:
        console.print(f"no frontier: {e}", markup=False)
        return
    render_frontier(answer, results, console)
