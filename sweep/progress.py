"""The live view on stderr: cells by state, what each worker does, rate, time left. Lines instead of a table where stderr is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..actors.cell import DIMENSIONS
from .names import of_cells
from .summary import escape, stage

LINE_EVERY_S = 15.0
FRONTIER_LINES = 6


class View:
    """``quiet`` shows nothing and still keeps the figures that `status` reads."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, emoji=False)
        if not self.console.is_terminal:
            self.console.width = 200  # a log has no width to fold at
        self.live: Live | None = None
        self.stages: dict[str, float] = {}
        self.labels: dict[str, str] = {}
        self.total = self.before = 0
        self.start: float | None = None
        self.shown = 0
        self.points: dict[str, dict[str, Any]] = {}  # finished cells: what the current frontier is drawn from
        self.front: list[str] = []
        self._last_line = 0.0
        self._last_stage = ("", 0.0)

    # -- before the cells ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show and time a step."""
        start = time.monotonic()
        with self.console.status(f"{name} ...") if self.console.is_terminal else contextlib.nullcontext():
            yield
        self.stages[name] = time.monotonic() - start

    def progress(self, stage: str, done: int, total: int) -> None:
        """Progress of planning (conversion of a model can take a minute)."""
        now = time.monotonic()
        if not self.console.is_terminal and (self._last_stage[0] != stage or now - self._last_stage[1] > LINE_EVERY_S):
            self._last_stage = (stage, now)
            self.console.print(f"{stage} {done}/{total}", highlight=False)

    def plan(self, config: Any, grid: Any, done: int) -> None:
        """What is about to happen."""
        names = of_cells(grid.cells)
        self.labels = {c.key: f"{c.model.split('/')[-1]} {names[c.key]}" for c in grid.cells}
        self.total, self.before = len(grid.cells), done
        models = len({c.model for c in grid.cells})
        self.console.print(
            f"[bold]{escape(config.name)}[/]: {len(grid.cells)} cells of {models} model(s), {done} done, {len(grid.cells) - done} to do"
            f" · suite {config.evaluation.suite} of {escape(grid.plan.data)} · results in {escape(config.results)}"
        )
        for note in grid.notes:
            self.say(f"  {note}")
        for skip in grid.skipped:
            self.console.print(f"  skipped {skip.model} {skip.label}: {skip.reason}", style="yellow", markup=False)

    def say(self, note: str) -> None:
        """A line that stays."""
        self.console.print(note, style="yellow", markup=False, highlight=False)

    # -- while they run -----------------------------------------------------------------------------------------------

    def update(self, snap: dict[str, Any], outcome: Any) -> None:
        if self.start is None:
            self.start = time.monotonic()
            if self.console.is_terminal:
                self.live = Live(console=self.console, refresh_per_second=4, transient=True)
                self.live.start()
        for row in snap["finished"]:
            self._finished(row, outcome)
        if snap["finished"]:
            self.add_points([point(row) for row in snap["finished"] if row["status"] == "done"])
        if self.live is not None:
            self.live.update(self._render(snap, outcome))
        elif time.monotonic() - self._last_line > LINE_EVERY_S and not snap["finished"]:
            self._last_line = time.monotonic()
            for w in snap["workers"]:
                if w["key"]:
                    self.console.print(
                        f"  worker {w['id']}: {self.labels.get(w['key'], w['key'])}: {_doing(w)}", markup=False, highlight=False
                    )

    def _finished(self, row: dict[str, Any], outcome: Any) -> None:
        self._last_line = time.monotonic()
        seconds = (row["finished_at"] - row["started_at"]).total_seconds()
        self.shown += 1
        head = f"[{self.before + self.shown}/{outcome.total}] {self.labels.get(row['key'], row['key'])}"
        if row["status"] == "done":
            ppl = next((m["value"] for m in row.get("metrics", ()) if m["metric"] == "perplexity"), None)
            more = f" · perplexity {ppl:.2f}" if ppl is not None else ""
            self.console.print(
                f"{head}: {seconds:.0f} s{more} · {row['bits_per_weight']:.2f} bits/weight", markup=False, highlight=False
            )
        else:
            self.console.print(
                f"{head}: failed: {row['error_type']}: {row['error'][:200]}", style="red", markup=False, highlight=False
            )

    def add_points(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Finished cells as ``point`` gives them; also those of earlier runs. Others of the record may have been asked other things."""
        self.points |= {p["key"]: dict(p) for p in points if p["key"] in self.labels}
        if self.live is not None:
            self.front = frontier_keys(list(self.points.values()))

    def state(self, snap: dict[str, Any], outcome: Any) -> dict[str, Any]:
        """The figures as JSON for `comptrust status` on another machine."""
        elapsed = time.monotonic() - (self.start or time.monotonic())
        fresh = outcome.done + outcome.failed - self.before
        left = outcome.total - outcome.done - outcome.failed
        rate = fresh / elapsed if elapsed > 0 and fresh else None
        return {
            "done": outcome.done, "failed": outcome.failed, "total": outcome.total, "elapsed_s": elapsed,
            "cells_per_hour": rate * 3600 if rate else None, "left_s": left / rate if rate else None,
            "workers": [{**w, "label": self.labels.get(w["key"], w["key"])} for w in snap["workers"]],
        }  # fmt: skip

    def _render(self, snap: dict[str, Any], outcome: Any) -> Group:
        state = self.state(snap, outcome)
        bar = Progress(
            TextColumn("cells"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
        )
        left = f"about {_clock(state['left_s'])} left" if state["left_s"] is not None else ""
        task = bar.add_task("cells", total=outcome.total, completed=outcome.done + outcome.failed, left=left)
        bar.tasks[task].start_time = bar.get_time() - state["elapsed_s"]
        table = Table(box=None, padding=(0, 2), show_header=False)
        for w in snap["workers"]:
            table.add_row(
                f"worker {w['id']}",
                escape(self.labels.get(w["key"], "-") if w["key"] else "-"),
                _doing(w) if w["key"] else "idle",
            )
        return Group(bar, table, self._frontier())

    def _frontier(self) -> Table:
        """The frontier so far, smallest first."""
        table = Table(box=None, padding=(0, 2), header_style="dim", title_style="dim", title_justify="left")
        if not self.front:
            return table
        trusted = self.points[self.front[0]]["trust"] is not None
        for name in ("frontier so far", "GB", "trust" if trusted else "perplexity"):
            table.add_column(name, justify="left" if name[0] == "f" else "right")
        best = sorted((self.points[k] for k in self.front), key=lambda p: p["size_bytes"])
        for p in best[:FRONTIER_LINES]:
            value = p["trust"] if trusted else p["perplexity"]
            table.add_row(escape(self.labels.get(p["key"], p["key"])), f"{p['size_bytes'] / 1e9:.3g}", f"{value:.4g}")
        if len(best) > FRONTIER_LINES:
            table.add_row(f"and {len(best) - FRONTIER_LINES} more", "", "")
        return table

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        if self.start is not None:
            self.stages["cells"] = time.monotonic() - self.start


def point(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the frontier needs of a committed row with its metrics: key, size, mean trust (None if incomplete), perplexity."""
    values = {
        (m["dimension"], m["metric"]): m["value"]
        for m in row["metrics"]
        if m["convention"] == "comptrust" and not m["scenario"]
    }
    scores = [values.get((d, "score")) for d in DIMENSIONS]
    trust = None if None in scores else sum(scores) / len(scores)
    return {
        "key": row["key"], "size_bytes": row["size_bytes"], "trust": trust, "perplexity": values.get(("utility", "perplexity")),
    }  # fmt: skip


def frontier_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys on the frontier of size (least) and mean trust (most), or perplexity (least) unless every row has its trust."""
    import moocore
    import numpy as np

    trusted = all(r["trust"] is not None for r in rows)
    second = [-r["trust"] if trusted else r["perplexity"] for r in rows]
    usable = [
        (r["key"], float(r["size_bytes"]), v) for r, v in zip(rows, second, strict=True) if v is not None and r["size_bytes"]
    ]
    if not usable:
        return []
    keep = moocore.is_nondominated(np.array([u[1:] for u in usable]), keep_weakly=True)
    return [u[0] for u, k in zip(usable, keep, strict=True) if k]


def _doing(worker: dict[str, Any]) -> str:
    return f"{stage(worker)}, {_clock(time.time() - worker['started'])}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
