"""W&B as a view of the record: one run a cell, grouped by sweep, and one run for the sweep with progress and frontier.

One actor owns all W&B traffic. It may hang, refuse or die: the sweep hands it rows without waiting, and ends it after a time limit.
A server that does not answer within ``init_timeout_s`` turns the rest of the sweep offline, once and said once; ``comptrust sync``
publishes the record later.
"""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ..actors.cell import DIMENSIONS
from ..actors.errors import BadInput
from ..actors.record import Record
from .config import SweepConfig
from .effects import label
from .progress import frontier_keys

log = logging.getLogger(__name__)

#: Columns of ``cells`` that go to a run's config; the rest are results and go to its summary.
CONFIG = (
    "key", "artifact_key", "model", "revision", "method", "bits", "group_size", "sparsity", "pattern", "params", "backend", "dtype",
    "calibration", "calibration_digest", "samples", "seqlen", "template", "seed", "suite", "device", "versions",
)  # fmt: skip
SUMMARY = (
    "status", "error_type", "error", "attempts", "parameters", "size_bytes", "bits_per_weight", "sparsity_reached", "overlap", "execution",
    "kernel", "compress_s", "evaluate_s", "peak_memory_bytes", "prefill_tokens_s", "decode_tokens_s",
)  # fmt: skip


#: Columns of view ``results`` in the table of the sweep's run.
FRONTIER = (
    "key", "model", "method", "bits", "sparsity", "pattern", "size_bytes", "bits_per_weight", "perplexity", "mmlu", "trust", "worst_drop",
    *DIMENSIONS,
)  # fmt: skip


def has_key() -> bool:
    """Whether W&B finds a key: in the environment, or in netrc for the server's host and port (where `wandb login` puts it)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Publisher:
    """Writes runs. ``mode`` falls back to offline when the server fails; ``notes`` says so."""

    def __init__(self, config: SweepConfig, sweep: str, folder: str, labels: Mapping[str, str]) -> None:
        self.config, self.sweep, self.folder, self.labels = config, sweep, folder, labels
        self.mode = config.wandb.mode
        self.notes: list[str] = []
        self.run: Any = None
        self._alarmed: set[str] = set()
        os.makedirs(folder, exist_ok=True)
        os.environ.setdefault("WANDB_SILENT", "true")

    def _init(self, **kwargs: Any) -> Any:
        import wandb

        w = self.config.wandb
        settings = wandb.Settings(
            init_timeout=w.init_timeout_s, finish_timeout=w.finish_timeout_s, console="off", silent=True, reinit="create_new",
            x_disable_stats=True, x_disable_machine_info=True, x_disable_meta=True, x_save_requirements=False, save_code=False,
            disable_git=True, x_primary=True,
        )  # fmt: skip
        common = {
            "project": w.project, "entity": w.entity, "group": f"{self.config.name}-{self.sweep}", "dir": self.folder, "settings": settings,
        }  # fmt: skip
        if self.mode == "online" and not has_key():  # the driver has one
            self._degrade("W&B has no key in the environment that Ray was started with on this node")
        if self.mode == "online":
            try:
                return wandb.init(mode="online", resume="allow", **common, **kwargs)
            except Exception as e:  # any failure of the view must leave the record's sweep running
                self._degrade(f"W&B does not answer ({type(e).__name__})")
        return wandb.init(mode="offline", **common, **kwargs)

    def _degrade(self, why: str) -> None:
        import wandb

        self.mode = "offline"
        self.notes.append(f"{why}; going on offline, publish later with `comptrust sync`")
        with contextlib.suppress(Exception):
            wandb.teardown(exit_code=1)

    def open(self) -> None:
        """Start the sweep's run."""
        self.run = self._init(
            id=f"{self.sweep}-sweep", name=self.config.name, job_type="sweep", config=self.config.model_dump(mode="json")
        )

    def cell(self, row: Mapping[str, Any], items: Sequence[Mapping[str, Any]] | None = None) -> None:
        """One finished or failed cell: its run."""
        import wandb

        flat = flatten(row)
        try:
            run = self._init(
                id=f"{self.sweep}-{row['key']}", name=(name := run_name(row, self.labels)), job_type="cell",
                tags=[row["method"], row["suite"] or "none"],
                config={c: row.get(c) for c in CONFIG} | {"over_seeds": name.replace(f" seed {row['seed']}", "")},
            )  # fmt: skip
            told = {k: v for k, v in flat.items() if k not in CONFIG and v is not None}
            for name in [n for n in run.summary.keys() if n not in told and n[0] != "_" and n != "items"]:  # noqa: SIM118 (no mapping)
                del run.summary[name]  # of a run that is resumed: an error since cured, a score since found invalid
            run.log({k: v for k, v in told.items() if isinstance(v, int | float)})
            run.summary.update(told)
            if items:
                names = ["dimension", "scenario", "item", "sample", "outcome", "score", "text"]
                run.log({"items": wandb.Table(columns=names, data=[[i.get(n) for n in names] for i in items])})
            run.finish(exit_code=0 if row["status"] != "failed" else 1)
        except Exception as e:  # see class docstring
            log.debug("W&B run of %s: %s", row["key"], e)
            if self.mode == "online":
                self._degrade(f"W&B does not answer ({type(e).__name__})")
                self.open()

    def progress(self, figures: Mapping[str, Any]) -> None:
        if self.run is not None:
            self.run.log(dict(figures))

    def frontier(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Cells (rows of view ``results``) as a table of the sweep's run, those on the frontier of size and trust or perplexity marked."""
        import wandb

        if not rows or self.run is None:
            return
        front = set(frontier_keys(rows))
        data = [[r[n] for n in FRONTIER] + [r["key"] in front] for r in rows]
        self.run.log({"frontier": wandb.Table(columns=[*FRONTIER, "on_frontier"], data=data)})
        self.run.summary["on_frontier"] = len(front)

    def alarms(self, found: Sequence[Any]) -> None:
        """Alarms as they come: the summary lists all; online each warning is a W&B alert, once."""
        if self.run is None:
            return
        texts = {f"{a.code}: {a.model} {a.cell}: {a.message}": a.severity for a in found}
        for text in texts.keys() - self._alarmed:
            if texts[text] == "warning" and self.mode == "online":
                self.run.alert(title=text.partition(":")[0], text=text)
        self._alarmed |= set(texts)
        self.run.summary["alarms"] = sorted(texts)

    def close(self, exit_code: int, figures: Mapping[str, Any] | None = None) -> list[str]:
        """End the sweep's run with its last figures; returns what went wrong on the way."""
        import wandb

        try:
            if figures:
                self.progress(figures)
            if self.run is not None:
                self.run.finish(exit_code=exit_code)
            wandb.teardown()  # completes an offline file; finish() alone may leave its last block unwritten
        except Exception as e:  # see class docstring
            self.notes.append(f"W&B did not take the end of the sweep ({type(e).__name__}); publish it with `comptrust sync`")
        return self.notes


def flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row and its metrics as flat names: ``ethics/score``, ``ethics/refusal``, ``utility/perplexity``."""
    out = {k: row.get(k) for k in (*CONFIG, *SUMMARY)}
    for m in row.get("metrics") or ():
        if m["convention"] == "comptrust" and m["value"] is not None:
            out["/".join(p for p in (m["dimension"], m["scenario"], m["metric"]) if p)] = m["value"]
    return out


def run_name(row: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The cell's own among ``labels`` (of ``sweeps/<id>.json``), behind the last part of the model's name."""
    model, name = row["model"], labels.get(row["key"])
    return f"{model.split('/')[-1]} {label(row) if name is None else name.removeprefix(model).strip()}"


# -- the actor --------------------------------------------------------------------------------------------------------


class SinkActor:
    """Owns the Publisher in a process of its own."""

    def __init__(self, config: dict[str, Any], sweep: str, folder: str, record: str) -> None:
        self.record = Record(record)
        labels = (self.record.get_json(f"sweeps/{sweep}.json") or {}).get("labels", {})
        self.publisher = Publisher(SweepConfig(**config), sweep, folder, labels)
        self.publisher.open()

    def pid(self) -> int:
        return os.getpid()

    def cell(self, row: dict[str, Any]) -> None:
        items = None
        if self.publisher.config.wandb.items and row["status"] == "done":
            table = self.record.get_table(f"items/{row['key']}.parquet")
            items = table.to_pylist() if table is not None else None
        self.publisher.cell(row, items)

    def progress(self, figures: dict[str, Any]) -> list[str]:
        self.publisher.progress(figures)
        return self.publisher.notes

    def picture(self, rows: list[dict[str, Any]], found: list[Any]) -> None:
        self.publisher.frontier(rows)
        self.publisher.alarms(found)

    def close(self, exit_code: int, figures: dict[str, Any]) -> list[str]:
        return self.publisher.close(exit_code, figures)


def picture(uri: str, keys: Sequence[str]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Finished cells of a sweep as rows of view ``results``, and their alarms; cells of earlier runs included."""
    from .alarms import alarms
    from .results import load_results

    try:
        results = load_results(uri)
    except BadInput:  # nothing recorded yet
        return [], []
    mine = set(keys)
    rows = [r for r in results.rows("select * from results where status = 'done' order by size_bytes") if r["key"] in mine]
    return rows, [a for a in alarms(results) if a.key in mine] if rows else []


class Sink:
    """The driver's end: never waits, except for ``finish``, and there at most its time limit."""

    def __init__(self, actor: Any, picture: Callable[[], Any], timeout: float, say: Callable[[str], None]) -> None:
        """``picture``: begins to draw in a process of its own and returns its reference."""
        self.actor, self.picture, self.timeout, self.say = actor, picture, timeout, say
        self.last = 0.0
        self.said: set[str] = set()
        self._pid = actor.pid.remote()
        self._pending: Any = None
        self._drawing: Any = None
        self._begun, self._cost = time.monotonic(), 0.0  # of the last picture, seconds

    def cell(self, row: dict[str, Any]) -> None:
        self.actor.cell.remote(row)

    def progress(self, outcome: Any, snap: Mapping[str, Any]) -> None:
        import ray

        if time.monotonic() - self.last < 10:
            return
        self.last = time.monotonic()
        if self._pending is not None:
            ready, _ = ray.wait([self._pending], timeout=0)
            if not ready:
                return  # W&B is behind: more figures would only queue up
            with contextlib.suppress(ray.exceptions.RayError):
                self._say(ray.get(ready[0]))
        self._pending = self.actor.progress.remote(
            {**_figures(outcome), "cells/running": sum(bool(w["key"]) for w in snap["workers"])}
        )

    def draw(self, last: bool = False) -> None:
        """Frontier and alarms of the record so far, at most once a minute and in a twentieth of the time; at the end for certain."""
        import ray

        now = time.monotonic()
        if last or (self._drawing is None and now - self._begun >= max(60.0, 20 * self._cost)):
            self._begun, self._drawing = now, self.picture()
        if self._drawing is None:
            return
        try:
            if not last and not ray.wait([self._drawing], timeout=0)[0]:
                return
            drawn = ray.get(self._drawing, timeout=self.timeout)
            self.actor.picture.remote(*drawn)
        except Exception as e:  # as for finish
            self._say([f"W&B has no current frontier ({type(e).__name__}); publish with `comptrust sync`"])
        self._drawing, self._cost = None, time.monotonic() - self._begun

    def _say(self, notes: Sequence[str]) -> None:
        for note in notes:
            if note not in self.said:
                self.said.add(note)
                self.say(note)

    def finish(self, outcome: Any) -> None:
        """Close the runs; after the time limit (plus a grace for the calls before it) end the actor and every process it started."""
        import psutil
        import ray

        timeout, children = self.timeout, []
        try:
            me = psutil.Process(ray.get(self._pid, timeout=timeout))
            children = [me, *me.children(recursive=True)]
            closing = self.actor.close.remote(outcome.exit_code, _figures(outcome))
            self._say(ray.get(closing, timeout=timeout + 5))
        except Exception as e:  # the view may be in any state; the record is complete without it
            self._say([f"W&B did not finish within {timeout:g} s ({type(e).__name__}); publish with `comptrust sync`"])
        finally:
            with contextlib.suppress(Exception):
                ray.kill(self.actor)
            for process in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def _figures(outcome: Any) -> dict[str, int]:
    return {"cells/done": outcome.done, "cells/failed": outcome.failed, "cells/total": outcome.total}


def folder_of(record: Record, name: str) -> str:
    """Where the runs of a sweep are written: beside its record, or in ``results/<name>`` here where that is elsewhere."""
    return record.root if record.local else os.path.abspath(os.path.join("results", name))


def start_sink(
    config: SweepConfig, record: Record, identity: str, keys: Sequence[str], name: str, say: Callable[[str], None]
) -> Sink:
    """The sink on the driver's own node (it writes offline runs to the driver's disk), for the driver's server. Not with its key:
    Ray shows what an actor is started with."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    env = {k: os.environ[k] for k in ("WANDB_BASE_URL",) if k in os.environ}
    actor = (
        ray.remote(SinkActor)
        .options(name=name, num_cpus=0, scheduling_strategy=here, runtime_env={"env_vars": env})
        .remote(config.model_dump(mode="json"), identity, folder_of(record, config.name), record.address)
    )
    # A process for each picture: it reads every item of the record, and gives the memory back.
    draw = ray.remote(max_calls=1, max_retries=0)(picture).options(num_cpus=0, scheduling_strategy=here)
    return Sink(actor, lambda: draw.remote(record.address, list(keys)), config.wandb.finish_timeout_s, say)
