"""``run_sweep``: Ray Tune enumerates the cells, coordinator trials hand them to pooled workers, the record decides what is left to do.

Tune's own state lives in a scratch folder and is thrown away: after any interruption the record alone says which cells are done.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import __version__
from ..actors.actor import WorkerConfig, cell_row, dense_of
from ..actors.cell import Cell
from ..actors.errors import BadInput
from ..actors.models import default_dtype
from ..actors.record import Record
from .config import SweepConfig, load_config
from .grid import Grid, expand, held, order
from .names import of_cells
from .pool import Need, Pool
from .progress import View
from .results import load_results

log = logging.getLogger(__name__)

#: What a worker does with a cell; a test or a scale run may name another class with the same methods.
EXECUTOR = "comptrust.actors.actor:Worker"
#: Trials of a sweep at most: a larger grid gives each trial several cells, because Tune keeps state of every trial in the driver.
MAX_TRIALS = 1000
#: A driver whose pool says nothing for so long ends; twice as long, and it is killed.
SILENCE_S = 45.0
#: Nodes to come of an autoscaler's group without a limit.
MAX_NODES = 1000
#: Errors of a cell that a smaller batch can cure.
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")


@dataclass
class Outcome:
    """How a sweep ended. ``exit_code``: 0 all cells done, 1 some failed, 130 interrupted."""

    sweep: str
    results: str
    total: int
    done: int
    failed: int
    skipped: int
    seconds: float
    interrupted: bool = False
    loads: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return 130 if self.interrupted else 0 if self.failed == 0 and self.done == self.total else 1


def run_sweep(
    sweep: str | Path | dict[str, Any] | SweepConfig,
    *,
    results: str | Path | None = None,
    overrides: tuple[str, ...] | list[str] = (),
    address: str | None = None,
    view: View | None = None,
    executor: str = EXECUTOR,
) -> Outcome:
    """Run or continue a sweep.

    ``sweep``: YAML file, shipped name, mapping or ``SweepConfig``; ``address``: a running Ray cluster (default: RAY_ADDRESS, else a
    local one). Raises ``BadInput`` before any work starts; a failing cell does not raise, it is a row of ``failed``.
    """
    config = sweep if isinstance(sweep, SweepConfig) else load_config(sweep, overrides)
    if results is not None:
        config = config.model_copy(update={"results": str(results)})
    view = view or View()
    start = time.monotonic()
    record = Record(config.results)
    with _signals(), _locked(record):
        check_writable(record)
        _check_wandb(config)
        with view.stage("planning"):
            grid = expand(config, view.progress)
            done = record.done()
            done -= unreferenced(record, [c for c in grid.cells if c.key not in done], done)
        todo = [c for c in grid.cells if c.key not in done]
        view.plan(config, grid, len(grid.cells) - len(todo))
        outcome = Outcome(
            "",
            config.results,
            len(grid.cells),
            len(grid.cells) - len(todo),
            0,
            len(grid.skipped),
            0.0,
            stages=view.stages,
        )
        if todo and config.evaluation.lm_eval:
            from ..actors.evaluate.lm_eval import load_tasks

            with view.stage("lm-eval data"):
                load_tasks(config.evaluation.lm_eval)
        if not todo:
            outcome.sweep = register(record, config, grid)
        else:
            # Ray and Tune print to stdout whenever a process ends, the sink's included; ours goes to stderr.
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                _launch(config, record, grid, todo, address, view, executor, outcome)
        outcome.seconds = time.monotonic() - start
    return outcome


# -- before the work --------------------------------------------------------------------------------------------------


def check_writable(record: Record) -> None:
    """``BadInput`` if the results place cannot be written, or holds the record of a newer comptrust."""
    try:
        record.put_json("comptrust.json", {"comptrust": __version__})
    except (OSError, PermissionError) as e:
        raise BadInput(
            f"cannot write to {record.uri!r}: {e}", where="results", fix="Check the path, its permissions and free space."
        ) from e
    for path in [*record.list("compact/cells")[-1:], *record.list("cells")[-1:]]:
        record.get_table(path)


def _check_wandb(config: SweepConfig) -> None:
    """Online mode needs a key before any work."""
    from .wandb_sink import has_key

    if config.wandb.mode == "online" and not has_key():
        raise BadInput(
            "'online' needs an API key, and there is none",
            where="wandb.mode",
            fix="Run `wandb login`, set WANDB_API_KEY, or use offline.",
        )


def unreferenced(record: Record, todo: list[Cell], done: set[str]) -> set[str]:
    """Dense cells that are done and whose reference was removed since, while cells to do are compared with it."""
    dense = {dense_of(c).key for c in todo} & done
    return {k for k in dense if not referenced(record, k)}


def referenced(record: Record, dense: str) -> bool:
    return f"reference/{dense}.safetensors" in record.list("reference", ".safetensors")


def register(record: Record, config: SweepConfig, grid: Grid) -> str:
    """Write ``sweeps/<id>.json``: config, keys, and of ``earlier`` forms of the sweep the keys that no later form has.

    A sweep of the same name in this record keeps its id.
    """
    earlier: list[dict[str, Any]] = []
    for known in record.sweeps():
        if known["name"] == config.name:
            identity, seen = known["id"], set(grid.keys)
            for form in [known, *known.get("earlier", [])]:  # newest first
                if keys := [k for k in form["keys"] if k not in seen]:
                    earlier.append({"config": form["config"], "keys": keys})
                    seen.update(keys)
            break
    else:
        identity = uuid.uuid4().hex[:8]
    names = of_cells(grid.cells)
    record.put_json(
        f"sweeps/{identity}.json",
        {
            "id": identity,
            "name": config.name,
            "config": config.model_dump(mode="json"),
            "keys": grid.keys,
            "labels": {c.key: f"{c.model} {names[c.key]}" for c in grid.cells},
            "skipped": [vars(s) for s in grid.skipped],
            "earlier": earlier,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    return identity


@contextlib.contextmanager
def _locked(record: Record) -> Iterator[None]:
    """One driver per local folder. On an object store overlapping drivers may do work twice, and never write rows twice."""
    if not record.local:
        yield
        return
    try:
        Path(record.root).mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{record.root}/.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise BadInput(
            f"another comptrust run works in {record.uri!r}",
            where="results",
            fix="Wait for it (comptrust status), or give --results elsewhere.",
        ) from None
    except OSError as e:
        raise BadInput(
            f"cannot write to {record.uri!r}: {e}", where="results", fix="Check the path and its permissions."
        ) from e
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM (Slurm preemption, `kill`) ends a sweep like Ctrl-C: resumable, exit code 130."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.getsignal(signal.SIGTERM)
    _catch_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _catch_sigterm() -> None:
    """Also after ``ray.init``, whose own handler (absl's, in C++) prints a stack trace and aborts the process 3 s later."""

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


# -- Ray --------------------------------------------------------------------------------------------------------------


def _launch(
    config: SweepConfig, record: Record, grid: Grid, todo: list[Cell], address: str | None, view: View, executor: str,
    outcome: Outcome,
) -> None:  # fmt: skip
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    joined = ray.is_initialized()  # the caller's own Ray, which goes on after us
    with view.stage("starting Ray"):
        connect(address)
        _catch_sigterm()
    scratch = tempfile.mkdtemp(prefix="comptrust-tune-")
    stop = threading.Event()
    sink = watcher = pool = None
    try:
        nodes = room()
        needs = {m: need_of(config, m, grid, nodes) for m in grid.need}
        workers = min(check_room(config, needs, nodes), len(todo))
        if note := dtype_note(config, needs):
            view.say(note)
        outcome.sweep = identity = register(record, config, grid)  # not before: what no node can run leaves no trace
        run = uuid.uuid4().hex[:6]
        worker_config = WorkerConfig(
            record=record.address,
            evaluation=config.evaluation.model_dump(mode="json"),
            threads=config.resources.cpus,
            cache_gb=config.resources.cache_gb,
            execution=config.execution,
            allow_bin=tuple(m.id for m in config.models if m.allow_bin),
        )
        ordered = order(todo, workers)
        pool = (
            ray.remote(PoolActor)
            .options(
                name=f"comptrust-{identity}-{run}-pool",
                num_cpus=0,
                max_concurrency=10_000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
            )
            .remote(
                f"comptrust-{identity}-{run}",
                identity,
                [c.model_dump(mode="json") for c in ordered],
                needs,
                workers,
                worker_config,
                executor,
                config.resources.max_failures,
            )
        )  # fmt: skip
        if config.wandb.mode != "disabled":
            from .wandb_sink import start_sink

            sink = start_sink(config, record, identity, grid.keys, f"comptrust-{identity}-{run}-sink", view.say)
        watcher = threading.Thread(
            target=_watch,
            args=(pool, sink, record, identity, outcome, view, stop),
            name="comptrust-watch",
            daemon=True,
        )
        watcher.start()
        _fit(config, ordered, workers, f"comptrust-{identity}-{run}-pool", worker_config.record, scratch)
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        stop.set()
        if watcher is not None:
            watcher.join(timeout=60)
        if sink is not None:
            sink.finish(outcome)
        view.close()
        with contextlib.suppress(KeyboardInterrupt):
            if not joined:
                ray.shutdown()
            elif pool is not None:
                ray.kill(pool)  # its workers end with it
        shutil.rmtree(scratch, ignore_errors=True)


def connect(address: str | None) -> None:
    """Join ``address`` (or RAY_ADDRESS), else start a local Ray that ends with this process."""
    import ray

    target = address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if not target:
        # One at a time: Rays that start together take each other's ports. "local": without it Ray joins whatever cluster was
        # last started on this machine.
        lock = FileLock(f"{tempfile.gettempdir()}/comptrust-ray-{os.getuid()}.lock")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=60)
        try:
            ray.init("local", include_dashboard=False, object_store_memory=256 * 2**20, **quiet)
        finally:
            lock.release()
        return
    if target != "auto":
        _reachable(target)
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    given = job.get("env_vars") or {}  # of `ray job submit`: what it sets for all nodes must not be set again
    env = {k: os.environ[k] for k in ("COMPTRUST_DATA",) if k in os.environ and k not in given}
    try:
        ray.init(target, runtime_env={"env_vars": env} if env else None, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as e:
        text = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise BadInput(
            f"cannot join Ray at {target!r}: {text}", where="--address",
            fix="The cluster needs this machine's Ray and Python versions (`comptrust doctor` prints them); if `ray start` said that it"
            " uses tokens, set RAY_AUTH_MODE=token, or give `auto` on one of its nodes.",
        ) from e  # fmt: skip


def _reachable(target: str) -> None:
    """A closed port says so at once; Ray itself would try for a minute."""
    host, _, port = target.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return
    except (OSError, ValueError) as e:
        raise BadInput(
            f"nothing answers at {target!r} ({e})",
            where="--address",
            fix="Give HOST:PORT of the head node, or `auto` on a node.",
        ) from e


def room() -> list[dict[str, float]]:
    """Resources of every node there is, and of those an autoscaler may add (``max_count`` of its groups, less the nodes there)."""
    import ray
    from ray._private.state import state

    nodes = [n for n in ray.nodes() if n["Alive"]]
    config = state.get_cluster_config()
    if config is None:
        return [n["Resources"] for n in nodes]
    there = Counter(n["Labels"].get("ray.io/node-group") for n in nodes)
    out = [n["Resources"] for n in nodes]
    for group in config.node_group_configs:
        more = MAX_NODES if group.max_count < 0 else group.max_count - there[group.name]
        out += [dict(group.resources)] * max(0, more)
    return out


def need_of(config: SweepConfig, model: str, grid: Grid, nodes: list[dict[str, float]]) -> Need:
    """Resources of a cell of ``model`` (its ``held``). Without a GPU: CPU workers."""
    own, common = grid.need[model], config.resources
    have = any(n.get("GPU") for n in nodes)
    gpus = own.gpus if own.gpus is not None else common.gpus if common.gpus is not None else (1 if have else 0)
    memory = own.memory_gb or common.memory_gb
    return Need(gpus, common.cpus, int((memory or 0) * 1e9))


def dtype_note(config: SweepConfig, needs: dict[str, Need]) -> str | None:
    """The dtype is part of a cell's key, so this machine chooses it: what may not be meant where it has no GPU and the workers do."""
    if default_dtype() != "float32" or not any(n.gpus for n in needs.values()) or all(m.dtype for m in config.models):
        return None
    return "no GPU on this machine: models without a dtype compute in float32 on the workers' GPUs; give them dtype: bfloat16"


def check_room(config: SweepConfig, needs: dict[str, Need], nodes: list[dict[str, float]]) -> int:
    """How many workers fit; ``BadInput`` at once if some cell fits on no node."""
    fit = 0
    for model, need in needs.items():
        if not any(_fits(need, n) for n in nodes):
            most = {k: max((n.get(k, 0) for n in nodes), default=0) for k in ("GPU", "CPU", "memory")}
            raise BadInput(
                f"a cell of {model!r} needs {need.gpus:g} GPUs, {need.cpus} CPUs and {need.memory / 1e9:g} GB; no node has that"
                f" (largest: {most['GPU']:g} GPUs, {most['CPU']:g} CPUs, {most['memory'] / 1e9:.3g} GB)",
                where="resources",
                fix="Lower resources.gpus, cpus or memory_gb, or join a larger cluster with --address.",
            )
        fit = max(fit, sum(_times(need, n) for n in nodes))
    return config.resources.workers or max(fit, 1)


def _fits(need: Need, have: dict[str, float]) -> bool:
    return _times(need, have) >= 1


def _times(need: Need, have: dict[str, float]) -> int:
    ratios = [have.get("CPU", 0) / need.cpus]
    if need.gpus:
        # A GPU is shared by whole cells only: two cells of 0.6 do not fit on one GPU and a fifth of the next.
        per = int(1 / need.gpus) if need.gpus < 1 else 1
        ratios.append(have.get("GPU", 0) * per if need.gpus < 1 else have.get("GPU", 0) // need.gpus)
    if need.memory:
        ratios.append(have.get("memory", 0) / need.memory)
    return int(min(ratios) + 1e-9)


def _fit(config: SweepConfig, cells: list[Cell], workers: int, pool: str, record: str, scratch: str) -> None:
    """Tune enumerates; a trial costs a reused process, and no CPU: a head node may have none, and workers may take all there are."""
    trials = batches(cells, MAX_TRIALS)
    import ray
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # On the driver's own node: a coordinator that dies with some other node would leave its worker without an owner.
    here = ray.get_runtime_context().get_node_id()
    have = next(n["Resources"] for n in ray.nodes() if n["NodeID"] == here)
    share = {r: 0.0001 for r in have if r.startswith("node:") and r != "node:__internal_head__"}  # every node has 1 of its own
    trial = tune.PlacementGroupFactory([share], bundle_label_selector=[{"ray.io/node-id": here}])
    trainable = tune.with_resources(_trainable(), trial)
    timeout, attempts = config.resources.timeout_s, config.resources.attempts
    tuner = tune.Tuner(
        trainable,
        param_space={
            "keys": tune.grid_search(trials),
            "pool": pool, "record": record, "timeout_s": timeout, "attempts": attempts,
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=min(workers + 1, len(trials)), reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=scratch,
            failure_config=tune.FailureConfig(max_failures=5),  # of the coordinator's process; a cell's failure is no trial's
            name="tune", verbose=0, checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False)
        ),
    )  # fmt: skip
    tuner.fit()


def batches(cells: list[Cell], most: int) -> list[list[str]]:
    """Keys in launch order as at most about ``most`` lists, each of one model in one dtype; one cell a list while that is enough."""
    size = -(-len(cells) // most)
    out: list[list[str]] = []
    open_: dict[str, list[str]] = {}
    for cell in cells:
        batch = open_.get(held(cell))
        if batch is None or len(batch) == size:
            batch = open_[held(cell)] = []
            out.append(batch)
        batch.append(cell.key)
    return out


def _watch(pool: Any, sink: Any, record: Record, identity: str, outcome: Outcome, view: View, stop: threading.Event) -> None:
    """Feed the live view, the sink and ``progress/<id>.json`` (for `comptrust status` elsewhere) from the pool, twice a second."""
    import ray

    state: dict[str, Any] = {}

    def write(ended: bool) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the view; the cells report it themselves
            if state:
                record.put_json(
                    f"progress/{identity}.json", {**state, "ended": ended, "updated": datetime.now(UTC).isoformat()}
                )

    rows, wrote, heard, here = 0, 0.0, time.monotonic(), ray.get_runtime_context().get_node_id()
    if outcome.done and view.console.is_terminal:  # the live frontier counts cells of earlier runs too
        known = load_results(record.uri).rows("select key, size_bytes, trust, perplexity from results where status = 'done'")
        view.add_points(known)
    while True:
        last = stop.is_set()
        try:
            snap = ray.get(pool.snapshot.remote(rows), timeout=20)
            heard = time.monotonic()
        except Exception as e:  # the cluster is going down: the sweep's own end reports it
            log.debug("no snapshot: %s", e)
            if not last and time.monotonic() - heard > SILENCE_S:
                write(ended=True)
                return _end(f"no word from Ray for {SILENCE_S:g} s", outcome, view, stop)
            if last:
                return write(ended=True)
            stop.wait(1)
            continue
        rows += len(snap["finished"])
        for row in snap["finished"]:
            outcome.done += row["status"] == "done"
            outcome.failed += row["status"] == "failed"
            if sink is not None:
                sink.cell(row)
        outcome.loads = snap["loads"]
        view.update(snap, outcome)
        state = view.state(snap, outcome)
        if sink is not None:
            sink.progress(outcome, snap)
            sink.draw(last)
        if last or time.monotonic() - wrote > 5:
            wrote = time.monotonic()
            if not last and not any(n["Alive"] for n in ray.nodes() if n["NodeID"] == here):
                write(ended=True)
                return _end("Ray died on this node", outcome, view, stop)  # its workers live on, and Tune waits for ever
            write(ended=last)
        if last:
            return
        stop.wait(0.5)


def _end(why: str, outcome: Outcome, view: View, stop: threading.Event) -> None:
    """Stop the sweep like Ctrl-C; if that hangs in Ray itself, end the process."""
    outcome.interrupted = True
    view.say(f"{why}: the same command goes on from the record")
    _thread.interrupt_main()
    if not stop.wait(SILENCE_S):
        os._exit(outcome.exit_code)


class PoolActor(Pool):
    """The pool as a Ray actor; makes workers as actors of its own, so that they end with it."""

    def __init__(
        self, name: str, sweep: str, cells: list[dict[str, Any]], needs: dict[str, Need], limit: int, config: WorkerConfig,
        executor: str, max_failures: int,
    ) -> None:  # fmt: skip
        self.sweep, self.name, self.needs, self.config, self.executor = sweep, name, needs, config, executor
        self.max_failures, self.failures = max_failures, 0
        self.cells = {c.key: c for c in (Cell(**d) for d in cells)}
        super().__init__(self._make, [(c.key, held(c), c.method == "dense") for c in self.cells.values()], limit)

    def _make(self, need: Need, number: int) -> Any:
        import ray

        me = ray.get_runtime_context().current_actor
        options: dict[str, Any] = {"memory": need.memory} if need.memory else {}
        env = {"OMP_NUM_THREADS": str(need.cpus), "TOKENIZERS_PARALLELISM": "false"}
        return (
            ray.remote(RayWorker)
            .options(
                name=f"{self.name}-worker{number}",
                num_gpus=need.gpus,
                num_cpus=need.cpus,
                runtime_env={"env_vars": env},
                **options,
            )
            .remote(self.config, self.executor, me, number, self.sweep)
        )

    async def take(self, key: str) -> tuple[Cell, int, Any] | None:
        """The cell of ``key`` with a worker for it; None if it has ended, or once too many cells have failed."""
        if self.states.get(key) in ("done", "failed"):
            return None  # asked by a trial that was restarted
        if self.failures >= self.max_failures:
            self.states[key] = "stopped"
            return None
        cell = self.cells[key]
        number, handle = await self.acquire(key, held(cell), cell.method == "dense", self.needs[held(cell)])
        return cell, number, handle

    async def finish(self, key: str, model: str, dense: bool, state: str, row: dict[str, Any] | None = None) -> None:
        self.failures += state == "failed"
        await super().finish(key, model, dense, state, row)


class RayWorker:
    """A worker behind Ray: reports progress to the pool, at most four times a second."""

    def __init__(self, config: WorkerConfig, executor: str, pool: Any, number: int, sweep: str) -> None:
        from importlib import import_module

        self.pool, self.number, self.sweep, self.last = pool, number, sweep, 0.0
        module, _, name = executor.partition(":")
        self.worker = getattr(import_module(module), name)(config, self._progress)
        self.record = Record(config.record)

    def _progress(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last > 0.25 or done == total:
            self.last = now
            self.pool.progress.remote(self.number, stage, done, total)

    def ready(self) -> None:
        """Answers once some node has room for this worker; ``BadInput`` where the record is not the driver's."""
        if f"sweeps/{self.sweep}.json" not in self.record.list("sweeps", ".json"):
            raise BadInput(
                f"{self.record.uri!r} on {socket.gethostname()} is not the driver's folder", where="results",
                fix="Give a folder that all nodes share, s3://... or gs://...",
            )  # fmt: skip
        self._progress("preparing", 1, 1)

    def _committed(self, cell: Cell) -> dict[str, Any] | None:
        """A coordinator that died may have had its cell computed: its successor asks for the cell again and gets the stored row."""
        row = self.record.committed(cell.key)
        return row if row is None or cell.method != "dense" or referenced(self.record, cell.key) else None

    def prepare(self, cell: Cell) -> None:
        if self._committed(cell) is None:
            self.worker.prepare(cell)

    def evaluate(self, cell: Cell, attempt: int, batch_scale: float) -> dict[str, Any]:
        return self._committed(cell) or self.worker.evaluate(cell, attempt, batch_scale)


def _trainable() -> Any:
    """The trial, made on first use so that importing this module does not import Ray Tune."""
    from ray import tune

    class Coordinator(tune.Trainable):
        """One trial: sees each of its cells through the pool to a committed row or a failure."""

        def setup(self, config: dict[str, Any]) -> None:
            self._config = dict(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._config = dict(new_config)
            return True

        def step(self) -> dict[str, Any]:
            config = dict(self._config)
            for key in config.pop("keys"):
                coordinate(key, **config)
            return {"done": True}

    return Coordinator


def why_dead(error: Exception) -> str:
    """The first line of Ray's message; of an error in the worker's start also the last one, which names it."""
    lines = str(error).strip().splitlines()
    return f"{lines[0].partition(',')[0]}: {lines[-1].strip()}" if "creation task" in lines[0] else lines[0]


def coordinate(key: str, pool: str, record: str, timeout_s: float | None, attempts: int) -> None:
    """Get a worker, prepare, wait for the dense reference, evaluate; retry by cause (node or worker death elsewhere, memory smaller)."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RaySystemError, RayTaskError

    broker = ray.get_actor(pool)
    attempt, scale = 1, 1.0
    while True:
        got = ray.get(broker.take.remote(key))
        if got is None:
            return
        cell, number, handle = got
        model, dense = held(cell), cell.method == "dense"
        start, died, lost, row = datetime.now(UTC), None, None, {}
        try:
            ray.get(handle.ready.remote())  # a node that has yet to come is no time of the cell
            begun = time.monotonic()
            ray.get(handle.prepare.remote(cell), timeout=timeout_s)
            left = timeout_s and max(0.0, timeout_s - (time.monotonic() - begun))
            if not dense and ray.get(broker.wait_dense.remote(number, model)) == "queued":
                # Its worker died and nobody has it: give this worker up so that the dense cell can have it.
                ray.get(broker.release.remote(number, model))
                time.sleep(0.5)
                continue
            row = ray.get(handle.evaluate.remote(cell, attempt, scale), timeout=left)
        except (RayActorError, RaySystemError) as e:
            died, lost = "dead", ("WorkerDied", why_dead(e))
        except GetTimeoutError:
            died, lost = "retire", ("Timeout", f"longer than resources.timeout_s = {timeout_s:g} s")
        except RayTaskError as e:  # beyond what a worker records by itself: a full disk, above all
            lost = type(e.cause).__name__, str(e.cause)
        withdrawn = ray.get(broker.release.remote(number, None if died else model, died == "dead", died == "retire"))
        if lost and not withdrawn:
            row = cell_row(
                cell, attempts=attempt, status="failed", error_type=lost[0], error=lost[1][:2000], started_at=start,
                finished_at=datetime.now(UTC),
            )  # fmt: skip
            with contextlib.suppress(OSError):  # where nothing can be written, the view alone says why
                Record(record).fail(row)
        curable = row and row["status"] == "failed" and row["error_type"] in ("WorkerDied", *OUT_OF_MEMORY)
        if withdrawn or (curable and attempt < attempts):
            if dense:
                ray.get(broker.dense_running.remote(model, "queued"))
            if not withdrawn:
                attempt, scale = attempt + 1, scale if died else scale / 2
            continue
        ray.get(broker.finish.remote(key, model, dense, row["status"], row))
        return
