"""The worker on a tiny model, in this process: what it commits, that it repeats itself exactly, and what survives a kill."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import comptrust
import pytest
from comptrust.actors.actor import Worker, WorkerConfig, cell_row, dense_of
from comptrust.actors.calibration import CalibrationConfig
from comptrust.actors.cell import Cell
from comptrust.actors.errors import BadInput, CellError
from comptrust.actors.evaluate.divergence import encode_outcomes
from comptrust.actors.evaluate.protocol import Outcome
from comptrust.actors.record import Record, to_table
from comptrust.sweep.config import load_config
from comptrust.sweep.effects import config_of
from comptrust.sweep.grid import expand
from comptrust.sweep.rescore import rescore
from comptrust.sweep.results import compact, load_results
from sweeps import sweep_dict


@pytest.fixture(scope="module")
def grid(tiny, tmp_path_factory):
    config = sweep_dict([tiny], tmp_path_factory.mktemp("results"))
    config["methods"] = [
        {"method": "gptq", "bits": 3, "group_size": 32},
        {"method": "nf4"},
        {"method": "wanda", "pattern": "2:4"},
    ]
    return load_config(config), expand(load_config(config)).cells


def worker(config, folder, progress=None) -> Worker:
    return Worker(WorkerConfig(str(folder), config.evaluation.model_dump(mode="json"), cache_gb=0.1), progress)


def rows(folder, sql):
    return load_results(folder).rows(sql)


@pytest.fixture(scope="module")
def computed(grid, tmp_path_factory):
    config, cells = grid
    folder = tmp_path_factory.mktemp("one")
    made = worker(config, folder)
    return folder, [made.run(c) for c in cells]


def test_every_cell_is_committed_with_identity_cost_and_versions(grid, computed):
    folder, done = computed
    assert [r["status"] for r in done] == ["done"] * 4, [r.get("error") for r in done]
    found = {r["method"]: r for r in rows(folder, "select * from results")}
    dense, gptq, wanda = found["dense"], found["gptq"], found["wanda"]
    assert dense["bits_per_weight"] == 32 and dense["kl_dense"] == 0 and dense["flips"] == 0
    assert gptq["bits"] == 3 and gptq["bits_per_weight"] == pytest.approx(3 + 16 / 32)  # a 16-bit scale for every 32 weights
    assert gptq["size_bytes"] < dense["size_bytes"] and gptq["kl_dense"] > 0
    assert wanda["sparsity_reached"] == pytest.approx(0.5) and wanda["pattern"] == "2:4" and wanda["sparsity"] == 0.5
    assert wanda["overlap"] is not None and dense["overlap"] is None
    for r in found.values():
        assert r["parameters"] == dense["parameters"] > 0
        assert r["peak_memory_bytes"] > 1e8 and r["prefill_tokens_s"] > 0 and r["decode_tokens_s"] > 0
        assert r["execution"] == "simulated" and r["kernel"] is None
        assert '"torch"' in r["versions"] and r["dense_key"] == dense["key"]


def test_the_packed_size_of_a_pruned_cell_is_what_its_packed_form_takes(grid, computed):
    """The formula that counts bytes against the bytes of really packed tensors."""
    from comptrust.actors.compress.export import pack_pruned
    from comptrust.kernels.formats import packed_bytes

    config, cells = grid
    made = worker(config, computed[0])
    made.prepare(next(c for c in cells if c.method == "wanda"))
    compressed = made.prepared[1]
    packed = pack_pruned(compressed)
    assert set(packed) == set(compressed.stored)
    for name, p in packed.items():
        assert packed_bytes(p) == compressed.stored[name].size_bytes, name


def test_the_same_cell_twice_gives_identical_metrics_and_items(grid, computed, tmp_path):
    config, cells = grid
    again = worker(config, tmp_path)
    reference = f"reference/{dense_of(cells[1]).key}.safetensors"
    Record(tmp_path).put(reference, Record(computed[0]).get(reference))
    for cell in reversed(cells[1:]):  # another order, another process state
        again.run(cell)
    for sql in (
        "select * from metrics where key != '{}' order by all",
        "select * from items where key != '{}' order by all",
        "select * from layers where key != '{}' order by all",
    ):
        query = sql.format(cells[0].key)
        assert rows(tmp_path, query) == rows(computed[0], query)


def test_rescore_repeats_every_metric_and_item_exactly(computed):
    tables = [f"select * from {t} order by all" for t in ("metrics", "items", "cells", "layers")]
    before = [rows(computed[0], t) for t in tables]
    assert rescore(str(computed[0])) == (4, 0)
    assert [rows(computed[0], t) for t in tables] == before


def test_rescore_repairs_what_a_wrong_parser_left(grid, computed, tmp_path):
    """Items of two cells as a parser that takes every answer to ethics for wrong would have left them: items, metrics, flips and the
    reference that later cells are compared with are those of a run with the right parser."""
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(computed[0], folder)
    record = Record(folder)
    dense = dense_of(grid[1][1]).key
    for key in (dense, grid[1][1].key):
        table = record.get_table(f"items/{key}.parquet").to_pylist()
        for row in table:
            if row["dimension"] == "ethics":
                row["outcome"], row["score"] = "wrong", 0.0
        record.put_table(f"items/{key}.parquet", to_table("items", table))
    path = f"reference/{dense}.safetensors"
    right = record.get_tensors(path)
    wrong = encode_outcomes(record.get_table(f"items/{dense}.parquet").to_pylist())
    assert not wrong.equal(right["outcomes"])
    record.put_tensors(path, {**{k: v.clone() for k, v in right.items()}, "outcomes": wrong})
    metrics = record.get_table(f"metrics/{grid[1][2].key}.parquet").to_pylist()
    for row in metrics:  # flips counted against the wrong reference
        if row["metric"] == "flips":
            row["value"] = 0.5
    record.put_table(f"metrics/{grid[1][2].key}.parquet", to_table("metrics", metrics))

    tables = [f"select * from {t} order by all" for t in ("metrics", "items", "cells", "layers")]
    assert [rows(folder, t) for t in tables] != [rows(computed[0], t) for t in tables]
    cells, changed = rescore(str(folder))
    assert cells == 4 and changed > 0
    assert [rows(folder, t) for t in tables] == [rows(computed[0], t) for t in tables]
    assert record.get_tensors(path)["outcomes"].equal(Record(computed[0]).get_tensors(path)["outcomes"])
    compact(folder)
    assert rescore(str(folder)) == (4, 0)
    assert [rows(folder, t) for t in tables] == [rows(computed[0], t) for t in tables]


def test_rescore_leaves_published_tables_alone(computed, tmp_path):
    record = Record(tmp_path)
    for name in ("cells", "metrics", "items", "layers"):
        table = Record(computed[0]).get_table(f"{name}/{computed[1][0]['key']}.parquet")
        record.put_table(f"{name}/published.parquet", table.slice(0, 0) if name in ("items", "layers") else table)
    before = record.get("metrics/published.parquet")
    assert rescore(str(tmp_path)) == (0, 0) and record.get("metrics/published.parquet") == before


def test_rescore_of_a_compacted_record_loses_no_cell_without_items(grid, computed, tmp_path):
    """A cell that asks nothing but perplexity, and a published row, stand in the generation that rescoring replaces."""
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(computed[0], folder)
    record = Record(folder)
    for key, status in (("perplexity-alone", "done"), ("published", "published")):
        for name in ("cells", "metrics", "items", "layers"):
            table = record.get_table(f"{name}/{grid[1][1].key}.parquet").to_pylist()
            changed = [{**row, "key": key, **({"status": status} if name == "cells" else {})} for row in table]
            record.put_table(f"{name}/{key}.parquet", to_table(name, changed if name in ("cells", "metrics") else []))
    compact(folder)
    tables = [f"select * from {t} order by all" for t in ("metrics", "items", "cells", "layers")]
    before = [rows(folder, t) for t in tables]
    assert rescore(str(folder)) == (4, 0)
    assert [rows(folder, t) for t in tables] == before
    assert record.done() == {c.key for c in grid[1]} | {"perplexity-alone", "published"}


def test_rescore_beside_a_compaction_gives_up_and_repeats(grid, computed, tmp_path, monkeypatch):
    import shutil

    from comptrust.sweep import rescore as module

    folder = tmp_path / "copy"
    shutil.copytree(computed[0], folder)
    metrics = module._metrics

    def meanwhile(*args):
        monkeypatch.undo()
        compact(folder)  # which holds what the parser said before
        return metrics(*args)

    monkeypatch.setattr(module, "_metrics", meanwhile)
    with pytest.raises(BadInput, match=r"a compaction ended meanwhile.*Run rescore again"):
        rescore(str(folder))
    assert rescore(str(folder)) == (4, 0) and Record(folder).done() == {c.key for c in grid[1]}


@pytest.mark.parametrize("compacted", [False, True])
def test_compacting_beside_a_rescoring_keeps_the_new_judgements(grid, computed, tmp_path, monkeypatch, compacted):
    """One that began before the parts were judged anew gives up; one in the middle of it removes none of them."""
    import shutil

    from comptrust.sweep import rescore as module
    from comptrust.sweep import results as results_module

    folder = tmp_path / "copy"
    shutil.copytree(computed[0], folder)
    key = grid[1][1].key
    table = Record(folder).get_table(f"items/{key}.parquet").to_pylist()
    Record(folder).put_table(
        f"items/{key}.parquet", to_table("items", [{**r, "outcome": "wrong", "score": 0.0} for r in table])
    )
    if compacted:
        compact(folder)
        beside, place, name = lambda: compact(folder), module, "_complete"
    else:
        beside, place, name = lambda: rescore(str(folder)), results_module, "_write_generation"
    original = getattr(place, name)

    def meanwhile(*args):
        monkeypatch.undo()
        beside()
        return original(*args)

    monkeypatch.setattr(place, name, meanwhile)
    if compacted:
        rescore(str(folder))
    else:
        with pytest.raises(BadInput, match="a rescoring ended meanwhile"):
            compact(folder)
    for _ in range(2):
        for query in (f"select * from {t} order by all" for t in ("metrics", "items", "cells", "layers")):
            assert rows(folder, query) == rows(computed[0], query)
        compact(folder)


def test_a_failing_cell_is_a_row_and_the_next_one_runs(grid, tmp_path, monkeypatch):
    config, cells = grid
    made = worker(config, tmp_path)
    from comptrust.actors import compress

    def broken(*args, **kwargs):
        raise CellError("layers.0: the Hessian is singular")

    with monkeypatch.context() as m:
        m.setattr(compress, "compress", broken)
        row = made.run(cells[1])
    assert (row["status"], row["error_type"]) == ("failed", "CellError")
    assert made.run(cells[1])["status"] == "done"
    assert rows(tmp_path, "select * from failed") == []  # it has succeeded since


def test_a_kept_error_keeps_no_tensors_but_its_traceback(grid, tmp_path, monkeypatch, caplog):
    """What the failed compression held must not count in the next cell's peak, nor stand in its way."""
    import torch
    from comptrust.actors import compress

    config, cells = grid
    made = worker(config, tmp_path)
    left = []

    def broken(*args, **kwargs):
        activations = torch.zeros(3)
        left.append(weakref.ref(activations))
        try:
            raise KeyError("inner")
        except KeyError as e:
            raise ZeroDivisionError("outer") from e

    monkeypatch.setattr(compress, "compress", broken)
    made.prepare(cells[1])
    assert left[0]() is None and made.error is not None
    made.evaluate(cells[1])
    assert "in broken" in caplog.text and "ZeroDivisionError: outer" in caplog.text


def test_the_peak_starts_when_the_old_model_is_gone(grid, tmp_path, monkeypatch):
    from comptrust.actors.cost import PeakMemory

    config, cells = grid
    made, before = worker(config, tmp_path), []
    made.prepare(cells[0])
    old = weakref.ref(made.model)
    monkeypatch.setattr(PeakMemory, "start", lambda self: before.append(old()))
    made.prepare(cells[0].model_copy(update={"dtype": "bfloat16"}))
    assert before == [None] and made.error is None


def test_without_a_dense_reference_divergence_is_null_and_the_cell_runs(grid, tmp_path):
    config, cells = grid
    made = worker(config, tmp_path)
    made.run(cells[1])
    ask = "select kl_dense, flips, worst_drop from results where method <> 'dense' order by flips"
    assert rows(tmp_path, ask) == [{"kl_dense": None, "flips": None, "worst_drop": None}]
    worker(config, tmp_path).run(cells[0])
    made.run(cells[2])  # the same worker, once there is one
    first, _ = rows(tmp_path, ask)
    assert first["kl_dense"] is not None and first["flips"] is not None


def test_finished_tasks_of_a_killed_cell_are_not_asked_again(grid, computed, tmp_path):
    """Kill at the end of the first task: the second worker asks only the rest, and the metrics are the same."""
    config, cells = grid
    cell = cells[0]

    class Killed(BaseException):
        pass

    def die(stage, done, total):
        if stage == "ethics" and done == 0:
            raise Killed

    with pytest.raises(Killed):
        worker(config, tmp_path, die).run(cell)
    assert list(Record(tmp_path).partials(cell.key)) == ["stereotype"]
    stages = []
    worker(config, tmp_path, lambda stage, done, total: stages.append(stage)).run(cell)
    assert "ethics" in stages and "stereotype" not in stages
    query = f"select * from metrics where key = '{cell.key}' order by all"
    assert rows(tmp_path, query) == rows(computed[0], query)
    assert Record(tmp_path).partials(cell.key) == {}


def test_slow_compressions_are_cached(grid, tmp_path, monkeypatch):
    from comptrust.actors import actor, compress

    config, cells = grid
    cell = next(c for c in cells if c.method == "gptq")
    monkeypatch.setenv("COMPTRUST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(actor, "CACHE_FROM_S", 0.0)
    first = worker(config, tmp_path / "a").run(cell)
    monkeypatch.setattr(compress, "compress", lambda *a, **k: pytest.fail("compressed again"))
    second = worker(config, tmp_path / "b").run(cell)
    assert second["status"] == "done", second.get("error")
    pick = lambda row: {m["metric"]: m["value"] for m in row["metrics"] if m["dimension"] == "utility"}
    assert pick(first) == pick(second)


def test_items_hold_what_a_scorer_needs(computed):
    outcomes = {r["outcome"] for r in rows(computed[0], "select distinct outcome from items")}
    assert outcomes <= {str(o) for o in Outcome}
    n = rows(computed[0], "select dimension, count(*) n from items group by dimension order by dimension")
    assert n == [{"dimension": "ethics", "n": 4 * 16}, {"dimension": "stereotype", "n": 4 * 16}]


def test_a_model_that_is_replaced_meanwhile_is_no_cell_of_the_sweep(tiny, tiny_pair, tmp_path, monkeypatch):
    """A library reads the folder again that the worker has long loaded; and the worker's own reading takes time."""
    import shutil

    from comptrust.actors import models
    from comptrust.actors.compress import backends

    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = load_config(sweep_dict([folder], tmp_path / "results"))
    dense = expand(config).cells[0]
    made = worker(config, tmp_path / "results")
    made.prepare(dense)
    assert made.error is None
    replace = lambda *args, **more: shutil.copy(tiny_pair[1] / "model.safetensors", folder)
    monkeypatch.setattr(backends, "run_backend", lambda *args, **more: pytest.fail("another model was compressed"))
    replace()
    made.prepare(dense.model_copy(update={"method": "rtn", "params": {"bits": 4}, "backend": "llmcompressor"}))
    assert isinstance(made.error, CellError) and "the sweep was planned with" in str(made.error)

    shutil.copy(tiny / "model.safetensors", folder)
    load = models.load
    monkeypatch.setattr(models, "load", lambda *args, **more: (load(*args, **more), replace())[0])
    made = worker(config, tmp_path / "results")
    made.prepare(dense)
    assert isinstance(made.error, CellError) and made.held is None


@pytest.mark.parametrize("knob", [{"weights": [1.0, 3.0]}, {"template": True}, {"template": True, "system": "Be brief."}])
def test_only_the_seed_of_a_calibration_makes_two_cells_one_configuration(knob):
    def row(**calibration):
        cell = Cell(
            model="m", revision="r", method="gptq", params={"bits": 4}, dtype="float32", calibration_digest="d",
            calibration=CalibrationConfig(**calibration).model_dump(mode="json"),
        )  # fmt: skip
        return {**cell_row(cell), "params": json.dumps({"bits": 4})}

    source = ["a.txt", "b.txt"] if "weights" in knob else "a.txt"
    one = config_of(row(source=source, **knob))
    assert one == config_of(row(source=source, **knob, seed=5)) != config_of(row(source=source))
    assert row(source="a.txt")["calibration"] == "a.txt"


def test_export_needs_the_cells_own_model_alone(tiny, tiny_pair, tmp_path, monkeypatch):
    """Of a sweep whose other model is gone, of a model with .bin weights that the sweep allows, beside another data pack, on a machine
    whose default dtype is another."""
    import shutil

    import torch
    from comptrust.sweep import grid as grids
    from comptrust.sweep.export import export_cell
    from comptrust.sweep.launch import register
    from safetensors.torch import load_file

    other, mine = shutil.copytree(tiny_pair[1], tmp_path / "other"), shutil.copytree(tiny, tmp_path / "mine")
    weights = load_file(mine / "model.safetensors")
    torch.save(weights, mine / "pytorch_model.bin")
    (mine / "model.safetensors").unlink()
    written = sweep_dict([other], tmp_path / "record")
    written["models"].append({"id": str(mine), "allow_bin": True})
    written["methods"] = [{"method": "magnitude", "pattern": "2:4"}]
    config = load_config(written)
    found = expand(config)
    cell = next(c for c in found.cells if c.model == str(mine) and c.method == "magnitude")
    record = Record(config.results)
    register(record, config, found)
    record.commit(cell_row(cell, status="done", attempts=1), [], [])

    shutil.rmtree(other)
    pack = tmp_path / "pack"
    shutil.copytree(Path(comptrust.__file__).parent / "actors" / "data" / "probes", pack)
    (pack / "stereotype.jsonl").write_text("\n".join((pack / "stereotype.jsonl").read_text().splitlines()[:48]) + "\n")
    monkeypatch.setenv("COMPTRUST_DATA", str(pack))
    monkeypatch.setattr(grids, "default_dtype", lambda: "bfloat16")  # as with a GPU
    with pytest.raises(BadInput, match="--format: gptq cannot hold this cell of magnitude"):
        export_cell(str(tmp_path / "record"), cell.key[:8], tmp_path / "out", "gptq")
    export_cell(str(tmp_path / "record"), cell.key[:8], tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    kept = out[name] != 0
    assert kept.float().mean() == 0.5 and torch.equal(out[name][kept], weights[name][kept])
    assert cell.key in (tmp_path / "out" / "README.md").read_text()


def test_a_cell_is_exported_from_where_its_model_lies_now(tiny, tmp_path):
    """After a move the sweep says that nothing is left to do, and its cells could not be exported; nor could RTN's where the calibration
    text of another method was gone."""
    import shutil

    from comptrust.sweep.export import export_cell
    from comptrust.sweep.launch import register

    before = shutil.copytree(tiny, tmp_path / "before")
    (text := tmp_path / "text.txt").write_text((Path(comptrust.__file__).parent / "actors/data/calibration.txt").read_text())
    written = sweep_dict([before], tmp_path / "record")
    written["methods"] = [{"method": "magnitude", "pattern": "2:4"}, {"method": "wanda", "pattern": "2:4"}]
    written["calibration"] |= {"source": str(text)}
    config = load_config(written)
    found = expand(config)
    cell = next(c for c in found.cells if c.method == "magnitude")
    record = Record(config.results)
    register(record, config, found)
    record.commit(cell_row(cell, status="done", attempts=1), [], [])

    before.rename(tmp_path / "after")
    with pytest.raises(BadInput, match=r"CELL: the model .*before' of this cell is not here any more.* name its new place"):
        export_cell(config.results, cell.key, tmp_path / "out")
    moved = load_config(written | {"models": [str(tmp_path / "after")]})
    register(record, moved, expand(moved))
    text.unlink()
    export_cell(config.results, cell.key, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_branch_that_moves_leaves_worker_plan_and_export_at_the_commit(tiny, tmp_path, monkeypatch):
    """The cells of a sweep that runs when the model's branch moves failed, and a chosen one could not be exported any more."""
    from comptrust.actors import models
    from comptrust.sweep import plan as plans
    from comptrust.sweep.export import export_cell
    from comptrust.sweep.launch import register

    heads = iter(["a" * 40, *["b" * 40] * 9])
    monkeypatch.setattr(models, "_on_hub", lambda spec, where, allow_bin: models.ModelRef(spec, "hub", next(heads)))
    fetched = set()
    monkeypatch.setattr(models, "_download", lambda ref, *, weights: fetched.add(ref.revision) or Path(tiny))
    written = sweep_dict(["org/name"], tmp_path / "record")
    written["methods"] = [{"method": "magnitude", "pattern": "2:4"}]
    config = load_config(written)
    grid = expand(config)
    dense, pruned = grid.cells
    assert worker(config, tmp_path / "record").run(dense)["status"] == "done"
    made = worker(config, tmp_path / "record").run(pruned)
    assert made["status"] == "done" and made["revision"] == "a" * 40
    register(Record(config.results), config, grid)
    export_cell(config.results, pruned.key[:8], tmp_path / "out")
    assert fetched == {"a" * 40} and (tmp_path / "out" / "model.safetensors").exists()

    heads = iter(["c" * 40, "d" * 40])
    assert [m["revision"] for m in plans.plan(config)["models"]] == ["c" * 40]


def test_a_dataset_is_read_once_for_all_methods_of_a_plan(tiny, tmp_path, monkeypatch):
    """Once for every block of methods: 40 times C4 in `plan beyond_perplexity`, and what changed meanwhile made methods differ."""
    from comptrust.actors import calibration

    read = []
    monkeypatch.setattr(calibration, "_dataset", lambda *_: read.append(1) or iter([f"text {i} " * 40 for i in range(99)]))
    written = sweep_dict([tiny], tmp_path / "record")
    written["methods"] = [{"method": "wanda", "pattern": "2:4"}, {"method": "gptq", "bits": 4, "group_size": 32}]
    written["calibration"] = {"source": "hub:org/name:train:text", "samples": 4, "seqlen": 64, "seed": [0, 1]}
    assert len(expand(load_config(written)).cells) == 5 and len(read) == 2


def test_a_model_that_cannot_be_read_is_named_by_its_place(tiny, tmp_path):
    import shutil

    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BadInput, match=r"models\[1\]\.id: .* has no tokenizer"):
        expand(load_config(sweep_dict([tiny, broken], tmp_path / "record")))


def test_sync_publishes_cells_that_the_sweep_no_longer_lists(grid, computed, tmp_path, monkeypatch):
    import shutil

    from comptrust.sweep import sync
    from comptrust.sweep.grid import Grid
    from comptrust.sweep.launch import register

    seen = []

    class Fake:
        def __init__(self, *args):
            pass

        def __getattr__(self, name):
            return lambda *args: []

        def cell(self, row, items):
            seen.append(row["key"])

    folder = tmp_path / "copy"
    shutil.copytree(computed[0], folder)
    config, cells = grid
    for some in (cells, cells[:2]):
        register(Record(folder), config, Grid(some, [], None))
    monkeypatch.setattr(sync, "Publisher", Fake)
    assert sync.sync(str(folder)).startswith("4 cells of 1 sweep(s)")
    assert sorted(seen) == sorted(c.key for c in cells)
