"""W&B as a view: what an offline file and a server really hold, and that no state of the server costs the sweep a result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from sweeps import sweep_dict
from wandb_tools import Server, read_offline

pytestmark = pytest.mark.ray
HERE = Path(__file__).parent
KEY = "0" * 40


def drive(config: dict, results: Path, timeout: float = 240, given: str = "", **env: str) -> subprocess.CompletedProcess:
    path = results.parent / f"{results.name}.yaml"
    path.write_text(json.dumps(config))
    return subprocess.run(
        [sys.executable, str(HERE / "drive.py"), str(path), given or str(results)], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "NO_PROXY": "127.0.0.1", **env},
    )  # fmt: skip


def small(tiny, results, mode, **wandb):
    config = sweep_dict([tiny], results, wandb={"mode": mode, "init_timeout_s": 5, "finish_timeout_s": 8, **wandb})
    config["methods"] = [
        {"method": "rtn", "bits": [4, 3], "group_size": 32},
        {"method": "gptq", "bits": 4, "group_size": 32, "damping": 0.666},
    ]
    return config


def wandb_processes() -> set[int]:
    return {
        p.pid
        for p in psutil.process_iter(["name", "cmdline"])
        if "wandb-core" in " ".join(p.info["cmdline"] or [p.info["name"] or ""])
    }


def test_offline_files_hold_what_was_logged(tiny, tmp_path):
    """Three good cells and a failing one: a run each, grouped, and the sweep's run with progress and frontier."""
    results = tmp_path / "results"
    done = drive(small(tiny, results, "offline"), results, given="~/results", HOME=str(tmp_path))  # as YAML may say it
    assert done.returncode == 1, done.stderr  # the bad cell
    outcome = json.loads(done.stdout)
    runs = {r["id"]: r for r in map(read_offline, (results / "wandb").glob("offline-run-*/run-*.wandb"))}
    sweep = outcome["sweep"]
    keys = json.loads((results / "sweeps" / f"{sweep}.json").read_text())["keys"]
    assert set(runs) == {f"{sweep}-sweep", *(f"{sweep}-{k}" for k in keys)}
    assert {r["group"] for r in runs.values()} == {f"tiny-{sweep}"}
    whole = runs[f"{sweep}-sweep"]
    assert whole["job_type"] == "sweep" and whole["exit"] == 1
    assert whole["config"]["name"] == "tiny" and whole["summary"]["on_frontier"] >= 1
    assert whole["history"][-1]["cells/done"] == 3 and whole["history"][-1]["cells/failed"] == 1
    table = json.loads(next((results / "wandb").glob("offline-run-*-sweep/files/media/table/frontier*.json")).read_text())
    from comptrust.sweep.alarms import alarms
    from comptrust.sweep.results import load_results

    found = alarms(load_results(results))
    assert found and len(whole["summary"]["alarms"]) == len(found)  # by chance some synthetic cell gains 10 points or more
    assert {row[0] for row in table["data"]} == {r["key"] for r in load_results(results).rows("select key from cells")}

    rows = {r["key"]: r for r in load_results(results).rows("select * from results")}
    names = {"tiny dense", "tiny rtn 4 g32", "tiny rtn 3 g32", "tiny gptq 4 g32"}
    assert {r["name"] for r in runs.values()} == {"tiny", *names}
    for key, row in rows.items():
        run = runs[f"{sweep}-{key}"]
        assert run["job_type"] == "cell" and run["exit"] == 0
        assert run["config"]["method"] == row["method"] and run["config"]["bits"] == row["bits"]
        assert run["summary"]["utility/perplexity"] == pytest.approx(row["perplexity"])
        assert run["summary"]["size_bytes"] == row["size_bytes"]
        assert run["summary"]["ethics/score"] == pytest.approx(row["ethics"])
        assert not any("text" in k or "items" in k for k in run["summary"])
    bad = next(r for r in runs.values() if r["exit"] == 1 and r["job_type"] == "cell")
    assert bad["summary"]["error"] == "bad cell"


def test_online_server_gets_every_run(tiny, tmp_path):
    results = tmp_path / "results"
    with Server() as server:
        done = drive(small(tiny, results, "online"), results, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        assert done.returncode == 1, done.stderr  # the bad cell
        outcome = json.loads(done.stdout)
        keys = json.loads((results / "sweeps" / f"{outcome['sweep']}.json").read_text())["keys"]
        assert {f"{outcome['sweep']}-{k}" for k in keys} <= set(server.runs)
        for key in keys:
            run = server.runs[f"{outcome['sweep']}-{key}"]
            assert run["groupName"] == f"tiny-{outcome['sweep']}" and run["summary"]["status"] in ("done", "failed")
    assert KEY not in done.stdout + done.stderr
    assert not any(KEY in p.read_text(errors="ignore") for p in results.rglob("*.json"))


@pytest.mark.parametrize("state", ["hang", "500", "refused", "dies"])
def test_a_broken_server_costs_no_row_and_no_long_wait(tiny, tmp_path, state):
    """The sweep goes on offline, says so once, ends within its time limits and leaves no process behind."""
    results, before = tmp_path / "results", wandb_processes()
    with Server({"hang": "hang", "dies": "ok"}.get(state, "500")) as server:
        if state == "dies":  # healthy until the first cell's run has begun, then it answers no more
            server.dies_after = 2
        url = "http://127.0.0.1:9" if state == "refused" else server.url
        start = time.monotonic()
        done = drive(small(tiny, results, "online"), results, WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
        seconds = time.monotonic() - start
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["done"] == 3
    assert done.stderr.count("W&B") == 1, done.stderr
    assert seconds < 120
    time.sleep(1)
    assert wandb_processes() <= before


def test_online_without_a_key_is_bad_input(tiny, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"} | {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "none"),
    }
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(small(tiny, tmp_path / "results", "online")))
    done = subprocess.run(
        [sys.executable, "-m", "comptrust.sweep", "run", str(path)], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: wandb.mode: 'online' needs an API key")
    assert not (tmp_path / "results" / "cells").exists()


def test_a_node_of_a_cluster_without_the_drivers_key_writes_offline_and_says_so(tmp_path):
    """`export WANDB_API_KEY` after `ray start`: the driver has the key, and what Ray starts has none."""
    script = (
        "import sys; from comptrust.sweep.config import load_config; from comptrust.sweep.wandb_sink import Publisher\n"
        "config = load_config({'name': 's', 'models': ['a/m'], 'wandb': {'mode': 'online'}})\n"
        "publisher = Publisher(config, 's1', sys.argv[1], {}); publisher.open(); print(*publisher.notes, publisher.close(0, {}))"
    )
    env = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"} | {
        "NETRC": str(tmp_path / "none"),
        "WANDB_PROJECT": "lab",
    }
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=True)
    assert "no key in the environment that Ray was started with" in done.stdout, done.stdout + done.stderr
    (run,) = [read_offline(p) for p in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert run["project"] == "lab"


def test_frontier_keys_are_the_undominated():
    from comptrust.sweep.progress import frontier_keys

    rows = [
        {"key": "small", "size_bytes": 1, "perplexity": 30.0, "trust": 20.0},
        {"key": "good", "size_bytes": 9, "perplexity": 10.0, "trust": 90.0},
        {"key": "dominated", "size_bytes": 9, "perplexity": 11.0, "trust": 80.0},
        {"key": "twin", "size_bytes": 1, "perplexity": 30.0, "trust": 20.0},
        {"key": "fluent", "size_bytes": 8, "perplexity": 9.0, "trust": 10.0},
    ]
    assert frontier_keys(rows) == ["small", "good", "twin"]
    rows[0]["trust"] = None  # one incomplete trust: perplexity for all
    assert frontier_keys(rows) == ["small", "twin", "fluent"]
    unknown = {"key": "unknown", "size_bytes": 0.5, "perplexity": None, "trust": None}
    assert frontier_keys([*rows, unknown]) == ["small", "twin", "fluent"]


def test_sync_writes_the_record_again(tiny, tmp_path):
    """After a sweep without W&B, `sync` makes the runs from the record alone."""
    from sweeps import comptrust

    results = tmp_path / "results"
    config = small(tiny, results, "disabled")
    assert drive(config, results).returncode == 1
    assert not (results / "wandb").exists()
    env = {k: v for k, v in os.environ.items() if k == "WANDB_API_KEY"}
    assert not env
    config_file = next((results / "sweeps").glob("*.json"))
    stored = json.loads(config_file.read_text())
    stored["config"]["wandb"]["mode"] = "offline"
    config_file.write_text(json.dumps(stored))
    done = comptrust("sync", str(results))
    assert done.returncode == 0, done.stderr
    runs = [read_offline(p) for p in (results / "wandb").glob("offline-run-*/run-*.wandb")]
    assert {r["job_type"] for r in runs} == {"cell", "sweep"} and len(runs) == 5


def test_sync_where_nothing_can_be_written_is_bad_input(tmp_path):
    from comptrust.actors.record import Record
    from sweeps import comptrust

    Record(tmp_path).put_json("sweeps/a.json", {"id": "a", "name": "a", "keys": [], "config": {"models": ["a/b"]}})
    (tmp_path / "wandb").write_text("a file, no folder")
    done = comptrust("sync", str(tmp_path))
    assert (done.returncode, done.stderr.partition(": W&B writes")[0]) == (2, "error: RESULTS"), done.stderr


def test_sync_takes_back_what_is_no_longer_so(tmp_path):
    """A cell that failed is done since, and a score fell to a rescoring: the run is resumed with the summary that it had."""
    from comptrust.actors.record import Record
    from sweeps import comptrust

    record = Record(tmp_path)
    cell = {"key": "k1", "model": "a/m", "method": "gptq", "bits": 4, "suite": "smoke", "params": {}}
    metric = {"convention": "comptrust", "dimension": "ethics", "scenario": "", "metric": "score"}
    config = {"name": "s", "models": [{"id": "a/m"}]}
    record.put_json("sweeps/s1.json", {"id": "s1", "name": "s", "config": config, "keys": ["k1", "k2"], "labels": {}})
    record.fail(
        {**cell, "status": "failed", "error_type": "CellError", "error": "NaN", "attempts": 1, "finished_at": datetime.now(UTC)}
    )
    told = []
    with Server() as server:
        env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
        for value in ("failed", 50.0, None):
            if value != "failed":
                record.commit({**cell, "status": "done"}, [{**metric, "value": value}], [])
            done = comptrust("sync", record.root, **env)
            assert done.returncode == 0, done.stderr
            told.append({k: v for k, v in server.runs["s1-k1"]["summary"].items() if k in ("status", "error", "ethics/score")})
            counts = [server.runs["s1-sweep"]["summary"][f"cells/{name}"] for name in ("done", "failed", "total")]
            assert counts == ([0, 1, 2] if value == "failed" else [1, 0, 2])
    assert told == [{"status": "failed", "error": "NaN"}, {"status": "done", "ethics/score": 50.0}, {"status": "done"}]


def test_sync_finds_the_key_of_wandb_login(tmp_path):
    """`run` takes a key from netrc, and so must the command that it names where W&B did not answer."""
    from comptrust.actors.record import Record
    from sweeps import comptrust

    record = Record(tmp_path / "results")
    cell = {"model": "a/m", "method": "gptq", "bits": 4, "suite": "smoke", "status": "done", "params": {}}
    metric = {"convention": "comptrust", "dimension": "utility", "scenario": "", "metric": "perplexity", "value": 9.0}
    labels = {"k1": "a/m gptq 4 seed 0 damping 0.01", "k2": "a/m gptq 4 seed 1 damping 0.01"}
    for seed, key in enumerate(labels):
        record.commit({**cell, "key": key, "seed": seed}, [metric], [])
    config = {"name": "s", "models": [{"id": "a/m"}]}
    record.put_json("sweeps/s1.json", {"id": "s1", "name": "s", "config": config, "keys": [*labels, "k3"], "labels": labels})
    with Server() as server:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1:{server.server_port}\n login user\n password {KEY}\n")
        (tmp_path / "netrc").chmod(0o600)
        done = comptrust("sync", record.root, WANDB_BASE_URL=server.url, NETRC=str(tmp_path / "netrc"), NO_PROXY="127.0.0.1")
        assert done.returncode == 0 and "written to W&B" in done.stdout, done.stdout + done.stderr
        assert {"s1-sweep", "s1-k1", "s1-k2"} <= set(server.runs)
        runs = [server.runs[f"s1-{key}"] for key in labels]
        # told apart by name, and brought together over seeds by a key of their config
        assert [r["displayName"] for r in runs] == ["m gptq 4 seed 0 damping 0.01", "m gptq 4 seed 1 damping 0.01"]
        assert [json.loads(r["config"])["over_seeds"]["value"] for r in runs] == ["m gptq 4 damping 0.01"] * 2
