"""Faults that really happen: processes killed at random moments, full disks, two drivers, signals. Nothing finished is lost or repeated."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from comptrust.actors.record import Record
from comptrust.sweep.export import find_cell
from comptrust.sweep.pool import AFFINITY_WAIT_S
from comptrust.sweep.results import load_results
from comptrust.sweep.status import status
from sweeps import sweep_dict

pytestmark = pytest.mark.ray
HERE = Path(__file__).parent
CELLS = 8


class Sweep:
    """A sweep of synthetic cells in a driver process, started again until it ends by itself."""

    def __init__(self, tiny: Path, folder: Path, seconds: float = 0.4, **more) -> None:
        self.results, self.log, self.yaml = folder / "results", folder / "log", folder / "sweep.yaml"
        self.yaml.write_text(json.dumps(sweep_dict([tiny], self.results, **more)))
        self.env = {**os.environ, "SYNTHETIC_LOG": str(self.log), "SYNTHETIC_SLEEP": str(seconds)}

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(HERE / "drive.py"), str(self.yaml), str(self.results)], env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self, timeout: float = 240) -> tuple[int, dict, str]:
        out, err = (driver := self.start()).communicate(timeout=timeout)
        return driver.returncode, json.loads(out.splitlines()[-1]) if out.strip() else {}, err

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def wait_for(self, word: str, count: int, timeout: float = 200) -> None:
        end = time.monotonic() + timeout
        while sum(line[0] == word for line in self.lines()) < count:
            assert time.monotonic() < end, f"no {count} x {word!r}: {self.lines()}"
            time.sleep(0.05)

    def check(self, cells: int = CELLS) -> None:
        """Every cell there once; no cell started again after it was committed."""
        rows = load_results(self.results).rows("select key, count(*) n from cells group by key")
        assert len(rows) == cells and all(r["n"] == 1 for r in rows)
        finished: set[str] = set()
        for word, key, *_ in self.lines():
            assert not (word == "start" and key in finished), f"{key} was computed again"
            if word == "done":
                finished.add(key)
        assert load_results(self.results).rows("select count(*) n from items") == [{"n": 4 * cells}]
        assert status(str(self.results))["sweeps"][0]["done"] == cells


def victims(driver: subprocess.Popen, kind: str) -> list[psutil.Process]:
    tree = psutil.Process(driver.pid).children(recursive=True)
    if kind == "driver":
        return [psutil.Process(driver.pid)]
    if kind == "raylet":
        return [p for p in tree if p.name() == "raylet"]
    return [p for p in tree if "RayWorker" in " ".join(p.cmdline())]


def round_of_kills(tiny: Path, folder: Path, seed: int) -> None:
    """One seeded round: a victim, a moment; then run on to the end."""
    draw = random.Random(seed)
    folder.mkdir()
    sweep = Sweep(tiny, folder, 0.8)
    kind = ["worker", "driver", "raylet"][seed % 3]
    driver = sweep.start()
    sweep.wait_for("start", draw.randint(1, CELLS // 2))
    time.sleep(draw.random() * 0.6)
    doomed = victims(driver, kind)
    assert doomed, f"no {kind} to kill"
    for process in doomed:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    if kind == "worker":
        out, err = driver.communicate(timeout=240)
        assert driver.returncode == 0, err  # a dead worker costs an attempt, not the sweep
        assert json.loads(out.splitlines()[-1])["done"] == CELLS
    else:
        try:
            _, err = driver.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            driver.kill()
            raise AssertionError(f"the driver hangs after its {kind} was killed") from None
        # The last cell may have been committed just before: exit code 0 is true only then.
        left = CELLS - len(Record(sweep.results).done())
        assert driver.returncode != 0 or left == 0, err
        code, outcome, err = sweep.finish()
        assert code == 0 and outcome["done"] == CELLS, err
    sweep.check()


@pytest.mark.parametrize("seed", range(5))
def test_kill_9_at_a_random_moment(tiny, tmp_path, seed):
    round_of_kills(tiny, tmp_path / "round", seed)


@pytest.mark.slow
def test_kill_9_many_rounds(tiny, tmp_path):
    for seed in range(5, int(os.environ.get("FAULT_ROUNDS", "30"))):
        round_of_kills(tiny, tmp_path / f"round{seed}", seed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_resumable_sweep(tiny, tmp_path, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would the driver
    sweep = Sweep(tiny, tmp_path)
    driver = sweep.start()
    sweep.wait_for("done", 2)
    driver.send_signal(number)
    out, err = driver.communicate(timeout=90)
    assert driver.returncode == 130, err
    assert json.loads(out.splitlines()[-1])["interrupted"] is True
    assert status(str(sweep.results))["sweeps"][0]["running"] is False
    before = {r["key"] for r in load_results(sweep.results).rows("select key from cells")}
    assert 2 <= len(before) < CELLS
    code, outcome, err = sweep.finish()
    assert code == 0 and outcome["done"] == CELLS, err
    sweep.check()


def test_second_driver_on_a_folder_is_refused_and_a_second_run_does_nothing(tiny, tmp_path):
    sweep = Sweep(tiny, tmp_path)
    driver = sweep.start()
    sweep.wait_for("start", 1)
    code, _, err = sweep.finish()
    assert code == 2 and "another comptrust run works in" in err
    _, err = driver.communicate(timeout=200)
    assert driver.returncode == 0, err
    starts = Counter(line[0] for line in sweep.lines())["start"]
    code, outcome, err = sweep.finish()
    assert code == 0 and outcome["done"] == CELLS and "starting Ray" not in outcome["stages"], err
    assert Counter(line[0] for line in sweep.lines())["start"] == starts
    # an amended YAML adds its cells and repeats none
    config = json.loads(sweep.yaml.read_text())
    config["methods"].append({"method": "rtn", "bits": 2, "group_size": 32})
    sweep.yaml.write_text(json.dumps(config))
    code, outcome, err = sweep.finish()
    assert code == 0 and outcome["done"] == CELLS + 1, err
    sweep.check(CELLS + 1)
    # and one that lost a block twice forgets none
    gone = [r["key"] for r in load_results(sweep.results).rows("select key from cells where method in ('rtn', 'wanda')")]
    for method in ("rtn", "wanda"):
        config["methods"] = [m for m in config["methods"] if m["method"] != method]
        sweep.yaml.write_text(json.dumps(config))
        assert sweep.finish()[0] == 0
    assert status(str(sweep.results))["sweeps"][0]["total"] == CELLS + 1 - len(gone) == 4
    assert [find_cell(str(sweep.results), key)[0].key for key in gone] == gone


def test_a_bad_cell_is_a_row_and_the_sweep_goes_on(tiny, tmp_path):
    config = sweep_dict([tiny], "")["methods"]
    config.append({"method": "gptq", "bits": 3, "group_size": 32, "damping": 0.666})
    sweep = Sweep(tiny, tmp_path, 0.1, methods=config)
    code, outcome, err = sweep.finish()
    assert code == 1 and (outcome["done"], outcome["failed"]) == (CELLS, 1), err
    failed = load_results(sweep.results).rows("select * from failed")
    assert [(f["error_type"], f["error"], f["attempts"]) for f in failed] == [
        ("CellError", "bad cell", 1)
    ]  # its own error: no retry
    state = status(str(sweep.results))["sweeps"][0]
    assert (state["done"], state["failed"], state["left"]) == (CELLS, 1, 0)
    assert state["failures"][0]["error"] == "bad cell"


def test_a_worker_that_cannot_start_says_why(tiny, tmp_path):
    sweep = Sweep(tiny, tmp_path, 0.0, methods=[], resources={"attempts": 2})
    sweep.env["EXECUTOR"] = "Unstartable"
    code, outcome, err = sweep.finish()
    assert code == 1 and outcome["failed"] == 1, err
    (failed,) = load_results(sweep.results).rows("select * from failed")
    assert (failed["error_type"], failed["attempts"]) == ("WorkerDied", 2)
    assert failed["error"].endswith("PermissionError: [Errno 13] Permission denied: '/home/nobody/.cache'")
    assert "\x1b" not in failed["error"] and "\n" not in failed["error"]


def test_the_time_limit_is_that_of_the_whole_cell(tiny, tmp_path):
    sweep = Sweep(tiny, tmp_path, 4, methods=[], resources={"timeout_s": 6})
    sweep.env["EXECUTOR"] = "Slow"
    code, _, err = sweep.finish()
    assert code == 1, err
    assert load_results(sweep.results).rows("select error_type, attempts from failed") == [
        {"error_type": "Timeout", "attempts": 1}
    ]


def test_a_damaged_part_is_computed_again(tiny, tmp_path):
    sweep = Sweep(tiny, tmp_path, 0.0)
    assert sweep.finish()[0] == 0
    key = sorted(Record(sweep.results).done())[3]
    part = sweep.results / "items" / f"{key}.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    (sweep.results / "cells" / "foreign.parquet").write_bytes(b"not ours")
    code, outcome, err = sweep.finish()
    assert code == 0 and outcome["done"] == CELLS, err
    starts = Counter(line[1] for line in sweep.lines() if line[0] == "start")
    assert starts[key] == 2 and sum(starts.values()) == CELLS + 1


def test_a_dense_cell_without_its_reference_is_computed_again_for_new_cells_only(tiny, tmp_path):
    """References are large and get deleted; what was computed without one would lack its divergence for good."""
    sweep = Sweep(tiny, tmp_path, 0.0, methods=[])
    assert sweep.finish()[0] == 0
    (dense,) = Record(sweep.results).done()
    reference = sweep.results / "reference" / f"{dense}.safetensors"
    reference.unlink()
    assert sweep.finish()[0] == 0 and len([w for w, *_ in sweep.lines() if w == "start"]) == 1
    sweep.yaml.write_text(
        json.dumps(sweep_dict([tiny], sweep.results, methods=[{"method": "rtn", "bits": 4, "group_size": 32}]))
    )
    code, outcome, err = sweep.finish()
    assert code == 0 and outcome["done"] == 2 and reference.exists(), err
    assert [key for word, key, *_ in sweep.lines() if word == "start"][:2] == [dense, dense]


def test_a_worker_keeps_its_model_while_cells_of_it_are_left(tiny_pair, tmp_path):
    """Two models, two workers: a worker loads another model only once its own is finished or does not come."""
    sweep = Sweep(tiny_pair[0], tmp_path, 0.2)
    sweep.yaml.write_text(json.dumps(sweep_dict(tiny_pair, sweep.results)))
    code, outcome, err = sweep.finish()
    assert code == 0 and outcome["done"] == 2 * CELLS, err
    rows = load_results(sweep.results).rows("select key, model, method from cells")
    models = {r["key"]: r["model"] for r in rows}
    dense = {r["key"] for r in rows if r["method"] == "dense"}
    done: set[str] = set()
    finished: Counter[str] = Counter()
    holds: dict[str, str] = {}
    free: dict[str, float] = {}
    for word, key, worker, at in sweep.lines():
        if word == "load":
            own = holds.get(worker)
            assert own is None or finished[own] == CELLS or float(at) - free[worker] > AFFINITY_WAIT_S, sweep.lines()
            holds[worker] = models[key]
        if word == "start" and key not in dense:  # no cell is evaluated before its model's dense cell is done
            assert any(models[d] == models[key] for d in dense & done), key
        if word == "done":
            done.add(key)
            finished[models[key]] += 1
            free[worker] = float(at)
    assert len(holds) == 2


def test_a_prepared_cell_says_that_it_waits_for_the_dense_one(tiny, tmp_path):
    sweep = Sweep(tiny, tmp_path, 12, resources={"workers": 2})
    driver = sweep.start()
    sweep.wait_for("start", 1)
    seen: set[str] = set()
    while "waiting for dense" not in seen and driver.poll() is None and len(sweep.lines()) < 5:
        state = status(str(sweep.results))["sweeps"][0]
        seen |= {w["stage"] for w in state["workers"]}
        time.sleep(0.2)
    driver.kill()
    driver.communicate()
    assert "waiting for dense" in seen


def test_two_dtypes_of_a_model_have_a_dense_cell_each(tiny, tmp_path):
    """One dense cell done lets no cell of the other dtype begin, and the other's still comes first."""
    sweep = Sweep(tiny, tmp_path, 0.5)
    models = [{"id": str(tiny), "dtype": d} for d in ("float32", "bfloat16")]
    config = {**sweep_dict([], sweep.results, resources={"workers": 3}), "models": models}
    sweep.yaml.write_text(json.dumps(config))
    code, outcome, err = sweep.finish()
    assert code == 0 and outcome["done"] == 2 * CELLS, err
    rows = {r["key"]: r for r in load_results(sweep.results).rows("select key, dtype, method from cells")}
    ready = set()
    for word, key, *_ in sweep.lines():
        if word == "start" and rows[key]["method"] != "dense":
            assert rows[key]["dtype"] in ready, key
        if word == "done" and rows[key]["method"] == "dense":
            ready.add(rows[key]["dtype"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KiB, if this machine lets us mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=False)


def test_full_disk_fails_cells_and_goes_on_once_there_is_room(tiny, tmp_path, small_disk):
    sweep = Sweep(tiny, tmp_path, 0.0)
    sweep.results = small_disk / "results"
    sweep.yaml.write_text(json.dumps(sweep_dict([tiny], sweep.results)))
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * 330_000)
    code, outcome, err = sweep.finish()
    assert code in (1, 2), (outcome, err)
    assert "No space left" in err
    ballast.unlink()
    code, outcome, err = sweep.finish()
    assert code == 0 and outcome["done"] == CELLS, err
    sweep.check()


def test_clocks_that_disagree(tiny, tmp_path):
    """A driver whose clock is ahead of ours is running, one that went silent long ago is not."""
    sweep = Sweep(tiny, tmp_path, 0.0)
    assert sweep.finish()[0] == 0
    record = Record(sweep.results)
    path = record.list("progress", ".json")[0]
    key = sorted(record.done())[0]
    record.delete(f"cells/{key}.parquet")
    for hours, running in ((2, True), (-2, False)):
        updated = (datetime.now(UTC) + timedelta(hours=hours)).isoformat()
        at_work = {"updated": updated, "ended": False, "done": CELLS - 1, "left_s": 9.0, "cells_per_hour": 1.0}
        record.put_json(path, {**record.get_json(path), **at_work})
        state = status(str(sweep.results))["sweeps"][0]
        assert (state["running"], state["left"]) == (running, 1)


@pytest.mark.slow
def test_two_drivers_on_an_object_store(tiny, tmp_path, bucket):
    """No lock there: work may be done twice, rows stand once."""
    sweep = Sweep(tiny, tmp_path)
    sweep.results = bucket
    first, second = sweep.start(), sweep.start()
    for driver in (first, second):
        _, err = driver.communicate(timeout=400)
        assert driver.returncode == 0, err
    results = load_results(sweep.results)
    assert results.rows("select count(*) n, count(distinct key) d from cells") == [{"n": CELLS, "d": CELLS}]
    assert results.rows("select count(*) n from items") == [{"n": 4 * CELLS}]
    assert len(results.record.list("sweeps", ".json")) <= 2
