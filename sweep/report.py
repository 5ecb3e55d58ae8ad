"""One self-contained HTML page of a sweep: recommendation, charts, claims, alarms, failures and answers.

The page asks nothing of the network: a content security policy with the digests of its own script and style forbids it.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..actors.cell import DIMENSIONS, METHODS
from ..actors.errors import BadInput
from . import report_data as data
from . import report_verdicts as verdicts
from .alarms import WARNING, Alarm, alarms
from .claims import claims
from .effects import BAND, Effects
from .recommend import Recommendation, importance, recommend
from .report_items import explore
from .report_text import embed, visible
from .results import Results

_ASSETS = Path(__file__).parent
_SCRIPTS = ("report_base.js", "report_charts.js", "report_items.js")
#: Change of the refusal rate that is hatched, cells in the profile.
REFUSAL_STEP, MOST_CHOSEN = 0.10, 6

Row = Mapping[str, Any]


def build(results: Results, out_path: str | Path, *, title: str | None = None, **constraints: Any) -> Path:
    """Write the report of ``results`` to ``out_path`` and return it.

    ``constraints``: those of ``recommend``, such as ``max_drop`` or ``max_size_gb``.
    ``BadInput`` where there is nothing to show, no place to write, or a constraint makes no sense.
    """
    rows = sorted(results.rows("select * from results where not superseded"), key=data.sort_key)
    failed = results.rows("select * from failed order by model, method, key")
    if not rows:
        why = f"only {len(failed)} failed cells" if failed else "no finished cell"
        raise BadInput(f"{results.record.uri} holds {why}", where="RESULTS", fix="See them: comptrust status RESULTS.")
    page = _page(results, rows, failed, title or Path(results.record.uri.rstrip("/")).name or "results", constraints)
    return _write(Path(out_path), page)


def _write(path: Path, text: str) -> Path:
    if path.is_dir():
        raise BadInput(f"{path} is a folder", where="-o", fix=f"Give a file: {path / 'report.html'}.")
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp.write_text(text, encoding="utf-8")
        os.replace(tmp, path)
    except OSError as e:
        raise BadInput(f"cannot write {path}: {e.strerror}", where="-o", fix="Give a file in a writable folder.") from e
    finally:
        if tmp.exists():
            tmp.unlink()
    return path


def _page(results: Results, rows: Sequence[Row], failed: Sequence[Row], title: str, constraints: Mapping[str, Any]) -> str:
    effects = Effects(results)
    index = {row["key"]: i for i, row in enumerate(rows)}
    compared = any(row["dense_key"] in index and row["method"] != "dense" for row in rows)
    found = claims(results, effects) if compared else None
    raised = alarms(results, effects)
    advice = recommend(results, effects=effects, **constraints) if effects.all else None
    payload = _payload(results, rows, effects, _wanted(rows, advice, raised))
    places = {c["key"]: verdicts.Place(i, c["model"], c["label"]) for i, c in enumerate(payload["cells"])}
    for cell in payload["cells"]:
        cell["warnings"] = sum(a.severity == WARNING and a.key == cell["key"] for a in raised)
    return _render(
        payload,
        title=title,
        subtitle=verdicts.subtitle(rows),
        facts=verdicts.counts(rows, effects, len(failed), raised, BAND),
        recommendation=verdicts.recommendation(advice, places),
        claims=verdicts.claims_table(found),
        alarms=verdicts.alarm_kinds(raised, places),
        failures=[
            {
                "cell": f"{f['model']} {data.label(f)}",
                "key": f["key"],
                "type": f["error_type"],
                "error": f["error"],
                "attempts": f["attempts"],
            }
            for f in failed
        ],
        mark_legend=verdicts.legend(effects, BAND),
        frontier_note=_frontier_note(payload["draws"]),
        items_note=_items_note(results, len(payload["items"]["rows"])),
        method=verdicts.method(rows, _scorers(results), BAND),
    )


def _wanted(rows: Sequence[Row], advice: Recommendation | None, raised: Sequence[Alarm]) -> list[str]:
    """Cells that a reader of the recommendation asks about first: chosen, runner-up, nearest miss, alarmed."""
    keys = []
    for choice in sorted(advice.choices, key=importance) if advice else ():
        keys += [choice.cell, choice.runner_up, choice.nearest_miss]
    keys += [a.key for a in raised if a.severity == WARNING]
    there = {row["key"] for row in rows if row["method"] != "dense"}
    return [k for k in dict.fromkeys(keys) if k in there]


def _payload(results: Results, rows: Sequence[Row], effects: Effects, wanted: Sequence[str]) -> dict[str, Any]:
    metrics = data.used_metrics(rows)
    ids = [m.id for m in metrics]
    dimensions = data.measured(rows)
    cells = data.cells(rows, effects, metrics, dimensions, BAND)
    utility = "mmlu" if "mmlu" in ids else "perplexity"
    return {
        "dims": [{"id": d, "name": data.NAMES[d]} for d in dimensions],
        "methods": METHODS,
        "metrics": [m._asdict() for m in metrics],
        "heat_extra": [m for m in ("trust", "worst_drop", utility, "size_bytes") if m in ids],
        "axes": [_first(ids, "size_bytes", "mmlu", "bits", "perplexity"), _first(ids, "trust", *DIMENSIONS, "perplexity")],
        "limit": BAND,
        "refusal_step": REFUSAL_STEP,
        "most_chosen": MOST_CHOSEN,
        "models": data.models(rows, cells),
        "cells": cells,
        "chosen": _chosen(cells, wanted),
        "draws": data.draws(effects, rows, metrics),
        "items": explore(results, rows, wanted),
    }


def _chosen(cells: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> list[int]:
    """Places of the first wanted cells of one model behind their dense cell: the profile as the page opens."""
    index = {c["key"]: i for i, c in enumerate(cells)}
    first = cells[index[wanted[0]]] if wanted else next((c for c in cells if c["family"] != "dense"), cells[0])
    mine = [index[k] for k in wanted if cells[index[k]]["model"] == first["model"]] or [index[first["key"]]]
    return [*([] if first["dense"] is None else [first["dense"]]), *mine[:2]]


def _frontier_note(draws: Mapping[str, Any] | None) -> str:
    if draws is None:
        return "Points only: there are neither items nor seeds to resample, so no probability is given."
    what = {"items": "prompts", "seeds": "calibration seeds"}
    basis = " and ".join(what[b] for b in draws["basis"].split("+"))
    return f"Probability: the share of {draws['count']} draws, resampling {basis}, in which a cell is on the frontier."


def _items_note(results: Results, shown: int) -> str:
    if not shown:
        return ""
    total = results.rows("select count(*) as n from items")[0]["n"]
    return (
        f"{shown:,} of {total:,} stored answers, beside the dense model's answer to the same prompt: changed outcomes first, "
        "a few of each kind. Text that may offend or name people is blurred until you ask for it."
    )


def _scorers(results: Results) -> list[str]:
    rows = results.rows("select distinct scorer, scorer_version from metrics where scorer is not null order by all")
    return [f"{r['scorer']} {r['scorer_version'] or ''}".strip() for r in rows]


def _first(measured: Sequence[str], *wanted: str) -> str | None:
    return next((m for m in (*wanted, *measured) if m in measured), None)


def _render(payload: Mapping[str, Any], **fields: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from .. import __version__

    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    style = (_ASSETS / "report.css").read_text(encoding="utf-8")
    script = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    policy = {
        "default-src": "'none'",
        "script-src": f"'sha256-{_sha(script)}'",
        "style-src": f"'sha256-{_sha(style)}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return environment.get_template("report.html.jinja").render(
        # Markup: our own assets, and JSON that embed() made unable to close its element
        css=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        data=Markup(embed(payload)),  # noqa: S704
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        limit=f"{BAND:g}",
        refusal_step=f"{100 * REFUSAL_STEP:g}",
        most_chosen=MOST_CHOSEN,
        version=__version__,
        generated=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **fields,
    )


def _sha(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
