"""What the decisions say, in the words and the order of the page: claims, alarms, recommendation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .alarms import WARNING, Alarm
from .claims import FAILS, HOLDS, UNDECIDED, Claims
from .effects import Effects
from .recommend import NONE, QUALIFIES, RECOMMENDED, Candidate, Choice, Recommendation, evaluation_of, importance
from .report_data import LEVEL, NAMES, Row, mark

#: Candidates listed below an answer; the heatmap holds them all.
CANDIDATES = 12


@dataclass(frozen=True)
class Place:
    """A cell on the page."""

    index: int
    model: str
    label: str

    def link(self) -> dict[str, Any]:
        return {"index": self.index, "name": f"{self.model} · {self.label}"}


TONES = {HOLDS: "yes", FAILS: "no", UNDECIDED: "unsure"}


def claims_table(found: Claims | None) -> dict[str, Any]:
    """Claims that could be asked of some model; a finding, or None, for each model in turn."""
    if found is None or not found.findings:
        return {"models": [], "rows": []}
    several = len({f.suite for f in found.findings}) > 1
    models = list(dict.fromkeys((f.model, f.suite) for f in sorted(found.findings, key=lambda f: (f.suite, f.model))))
    names = [f"{model} ({suite})" if several else model for model, suite in models]
    rows = []
    for claim in found.claims:
        of = {(f.model, f.suite): f for f in found.of(claim.id)}
        if not of:
            continue
        findings = [
            {
                "model": name,
                "verdict": f.verdict,
                "tone": TONES[f.verdict],
                "leaning": f.leaning if f.verdict == UNDECIDED and f.leaning != UNDECIDED else "",
                "basis": f.basis,
                "observed": f.observed,
            }
            if (f := of.get(model))
            else None
            for model, name in zip(models, names, strict=True)
        ]
        rows.append(
            {"id": claim.id, "title": claim.title, "expected": claim.expected, "test": claim.test, "findings": findings}
        )
    return {"models": names, "rows": rows}


def alarm_kinds(found: Sequence[Alarm], cells: Mapping[str, Place]) -> list[dict[str, Any]]:
    """Alarms by kind, warnings first; cells of one message together. ``cells``: by key."""
    kinds: dict[tuple[str, bool], dict[str, list[dict[str, Any]]]] = {}
    for a in found:
        same = kinds.setdefault((a.code, a.severity == WARNING), {}).setdefault(a.message, [])
        same.append(cells[a.key].link())
    return [
        {
            "name": code.replace("_", " ").capitalize(),
            "warning": warning,
            "count": len(rows),
            "rows": [{"message": message, "cells": same} for message, same in rows.items()],
        }
        for (code, warning), rows in kinds.items()
    ]


def counts(rows: Sequence[Row], effects: Effects, failed: int, raised: Sequence[Alarm], limit: float) -> list[dict[str, str]]:
    """The sweep in six numbers."""
    compressed = [r for r in rows if effects.of(r["key"])]
    marks = {r["key"]: [mark(e, limit) for e in effects.of(r["key"]).values()] for r in compressed}
    invalid = sum(any(not e.valid for e in effects.of(r["key"]).values()) for r in compressed)
    clean = sum("worse" not in marks[r["key"]] and all(e.valid for e in effects.of(r["key"]).values()) for r in compressed)
    unstable = {k for r in compressed for k in effects.seeds(r["key"]) if any(e.seed_unstable for e in effects.of(k).values())}
    bases = len({r["model"] for r in rows})
    return [
        {
            "name": "Compressed cells",
            "value": str(sum(r["method"] != "dense" for r in rows)),
            "more": f"of {_many(bases, 'model')}",
        },
        {"name": "No marked drop", "value": str(clean), "more": f"of {len(compressed)} compared"},
        {"name": "Seed-unstable", "value": str(len(unstable)), "more": "cells"},
        {"name": "Invalid", "value": str(invalid), "more": "with a silent dimension"},
        {"name": "Failed", "value": str(failed), "more": ""},
        {"name": "Warnings", "value": str(sum(a.severity == WARNING for a in raised)), "more": ""},
    ]


def _many(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def subtitle(rows: Sequence[Row]) -> str:
    published = sum(r["status"] == "published" for r in rows)
    parts = [_many(len(rows), "cell"), f"suite {', '.join(sorted({str(r['suite']) for r in rows}))}"]
    if published:
        parts.append("all from published tables" if published == len(rows) else f"{published} from published tables")
    return " · ".join(parts)


def legend(effects: Effects, limit: float) -> list[str]:
    """What the marks of the heatmap rest on, for the bases that occur."""
    bases = {e.basis for e in effects.all if e.delta is not None}
    tests = sum(e.p is not None for e in effects.all)
    out = []
    if "items" in bases:
        out.append(f"▾ ▴ worse, better than dense: paired test, Holm over {tests:,} comparisons, p < {LEVEL:g}")
        out.append(f"= equal within ±{limit:g} points (two one-sided tests)")
    if bases - {"items"}:
        what = "where there are no items" if "items" in bases else "scores without items allow no test"
        out.append(f"▾ ▴ beyond ±{limit:g} points: {what}")
    return out


def method(rows: Sequence[Row], scorers: Sequence[str], limit: float) -> list[str]:
    """How to read the page, and what made its numbers."""
    lines = [
        "Scores run from 0 to 100, higher is better, under convention comptrust. Trust is the mean of the eight dimensions and "
        "is missing where one is. Worst is the largest fall against dense in points.",
        "A cell is compared with the dense cell of its own model and evaluation. Suites and evaluations are never mixed.",
        "A dimension is invalid where more than half of its answers are empty, unparseable or degenerate, because silence "
        "scores well in the published formulas, and fairness also where all get the same answer. Refusals are counted apart: "
        "hatching shows where a score moved with them.",
        f"A cell is seed-unstable in a dimension whose standard deviation over calibration seeds exceeds {limit:g} points.",
        "Dots of the Pareto chart without a value on an axis are left out and counted. Ties stay on the frontier together.",
        "Control characters, invisible ones and those that turn the reading direction are shown as ⟦U+XXXX⟧.",
    ]
    if scorers:
        lines.append(f"Scorers: {', '.join(scorers)}.")
    if devices := sorted({r["device"] for r in rows if r["device"]}):
        lines.append(f"Devices: {', '.join(devices)}.")
    if versions := sorted({_versions(r["versions"]) for r in rows if r["versions"]}):
        lines.append(f"Made with {'; '.join(versions[:4])}.")
    return lines


def _versions(text: str) -> str:
    return ", ".join(f"{name} {version}" for name, version in json.loads(text).items())


def recommendation(found: Recommendation | None, cells: Mapping[str, Place]) -> dict[str, Any] | None:
    """The answer over all, then those of the other base models. ``cells``: by key."""
    if found is None:
        return None
    several = len({c.evaluation for c in found.choices}) > 1 or len({c.model for c in found.choices}) < len(found.choices)
    choices = sorted(found.choices, key=importance)

    def link(key: str | None) -> dict[str, Any] | None:
        return None if key is None else cells[key].link()

    def card(c: Choice) -> dict[str, Any]:
        return {
            "model": f"{c.model} ({evaluation_of(c, found.choices)})" if several else c.model,
            "verdict": c.verdict if c.verdict != NONE else "none qualifies",
            "tone": {RECOMMENDED: "yes", UNDECIDED: "unsure", NONE: "no"}[c.verdict],
            "headline": {UNDECIDED: "Not decided by these answers"}.get(c.verdict, "No cell qualifies"),
            "cell": link(c.cell),
            "runner_up": link(c.runner_up),
            "nearest": link(c.nearest_miss),
            "reasons": c.reasons,
            "change": c.would_change,
            "total": len(c.candidates),
            "candidates": [
                _candidate(k) | {"cell": {"index": cells[k.key].index, "name": cells[k.key].label}}
                for k in c.candidates[:CANDIDATES]
            ],
        }

    first, *others = map(card, choices)
    rules = [
        {
            "rule": r.rule,
            "note": r.note,
            "supports": [link(k) for k in r.supports],
            "contradicts": [link(k) for k in r.contradicts],
        }
        for r in found.rules
    ]
    limits = [f"{name.replace('_', ' ')} {value:g}" for name, value in found.constraints.items() if value is not None]
    return {"first": first, "others": others, "rules": rules, "limits": ", ".join(limits), "warnings": found.warnings}


def _candidate(c: Candidate) -> dict[str, Any]:
    binding = c.binding
    return {
        "size": "–" if c.size_bytes is None else f"{c.size_bytes / 1e9:.3g}",
        "trust": "–" if c.trust is None else f"{c.trust:.1f}",
        "drop": "–" if binding is None else f"{binding.drop:.1f}",
        "bound": "–" if binding is None or binding.upper is None else f"{binding.upper:.1f}",
        "dimension": "" if binding is None else NAMES[binding.dimension],
        "status": c.status,
        "tone": {QUALIFIES: "yes", UNDECIDED: "unsure"}.get(c.status, "no"),
        "why": c.reasons[0] if c.reasons else "",
    }
