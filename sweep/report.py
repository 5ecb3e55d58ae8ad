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
from .effects import Effects
from .report_items import explore
from .report_text import embed, visible
from .results import Results

_ASSETS = Path(__file__).parent
_SCRIPTS = ("report_base.js", "report_charts.js", "report_items.js")
#: Points beyond which a change leaves the band, change of the refusal rate that is hatched, cells in the profile.
LIMIT, REFUSAL_STEP, MOST_CHOSEN = 5.0, 0.10, 6

Row = Mapping[str, Any]


def build(results: Results, out_path: str | Path, *, title: str | None = None) -> Path:
    """Write the report of ``results`` to ``out_path`` and return it.

    ``BadInput`` where there is nothing to show or no place to write.
    """
    rows = sorted(results.rows("select * from results"), key=data.sort_key)
    failed = results.rows("select * from failed order by model, method, key")
    if not rows:
        why = f"only {len(failed)} failed cells" if failed else "no finished cell"
        raise BadInput(f"{results.record.uri} holds {why}", where="RESULTS", fix="See them: comptrust status RESULTS.")
    page = _page(results, rows, failed, title or Path(results.record.uri.rstrip("/")).name or "results")
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


def _page(results: Results, rows: Sequence[Row], failed: Sequence[Row], title: str) -> str:
    effects = Effects(results)
    payload = _payload(results, rows, effects)
    return _render(
        payload,
        title=title,
        subtitle="",
        facts=[],
        recommendations=[],
        rules=[],
        claims=[],
        claims_note="",
        alarms=[],
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
        mark_legend=[],
        frontier_note="",
        items_note="x" if payload["items"]["rows"] else "",
        method=[],
        source="",
    )


def _payload(results: Results, rows: Sequence[Row], effects: Effects) -> dict[str, Any]:
    metrics = data.used_metrics(rows)
    ids = [m.id for m in metrics]
    cells = data.cells(rows, effects, metrics, LIMIT)
    utility = "mmlu" if "mmlu" in ids else "perplexity"
    return {
        "dims": [{"id": d, "name": data.NAMES[d]} for d in DIMENSIONS],
        "methods": METHODS,
        "metrics": [m._asdict() for m in metrics],
        "heat_extra": [m for m in ("trust", "worst_drop", utility, "size_bytes") if m in ids],
        "axes": [_first(ids, "size_bytes", "mmlu", "bits", "perplexity"), _first(ids, "trust", *DIMENSIONS, "perplexity")],
        "limit": LIMIT,
        "refusal_step": REFUSAL_STEP,
        "most_chosen": MOST_CHOSEN,
        "models": data.models(rows, cells),
        "cells": cells,
        "chosen": [0, 1, 2],
        "draws": data.draws(results, rows, metrics),
        "items": explore(results, rows, []),
    }


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
        limit=f"{LIMIT:g}",
        refusal_step=f"{100 * REFUSAL_STEP:g}",
        most_chosen=MOST_CHOSEN,
        version=__version__,
        generated=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **fields,
    )


def _sha(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
