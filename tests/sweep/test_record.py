from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from comptrust.actors import record as record_module
from comptrust.actors.errors import BadInput
from comptrust.actors.record import CELLS, Record, to_table
from comptrust.sweep.cli import Format, query
from comptrust.sweep.results import compact, load_results
from comptrust.sweep.status import status
from sweeps import comptrust


def cell(key: str, **more) -> dict:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return {
        "key": key, "artifact_key": "a" + key, "model": "m", "revision": "r", "method": "rtn", "bits": 4, "params": {"bits": 4},
        "dtype": "float32",
        "suite": "smoke", "evaluation": "e", "status": "done", "size_bytes": 10, "attempts": 1, "started_at": now, "finished_at": now,
        **more,
    }  # fmt: skip


def metric(dimension: str, value, name: str = "score", convention: str = "comptrust") -> dict:
    return {"convention": convention, "dimension": dimension, "scenario": "", "metric": name, "value": value, "n": 16}


def commit(record: Record, key: str, score: float = 50.0, **more) -> None:
    metrics = [
        metric("ethics", score),
        metric("ethics", 1.0, "valid"),
        metric("ethics", 0.25, "refusal"),
        metric("utility", 12.5, "perplexity"),
    ]
    metrics.append(metric("ethics", 1.0, "score", "dt-head"))  # another convention must not show in `results`
    items = [
        {"dimension": "ethics", "scenario": "s", "item": f"i{n}", "sample": 0, "target": {"label": n}, "text": "x"}
        for n in range(3)
    ]
    record.commit(cell(key, **more), metrics, items, [{"layer": "l", "error": 0.1}])


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / "results")


def test_a_committed_cell_is_read_back(record):
    commit(record, "k1")
    results = load_results(record.uri)
    row = results.rows("select * from results")[0]
    assert (row["key"], row["ethics"], row["ethics_refusal"], row["ethics_valid"], row["perplexity"]) == (
        "k1",
        50.0,
        0.25,
        True,
        12.5,
    )
    assert row["toxicity"] is None and row["toxicity_valid"] is False and row["trust"] is None and row["valid"] is False
    assert json.loads(results.items(["k1"]).column("target")[0].as_py()) == {"label": 0}
    assert record.done() == {"k1"}


@pytest.mark.parametrize("upto", ["layers", "items", "metrics"])
def test_without_the_mark_nothing_is_there(record, upto):
    """A crash before cells/<key>.parquet leaves parts that no reader sees and that cause no skip."""
    commit(record, "k0")
    commit(record, "k1")
    record.delete("cells/k1.parquet")
    for name in ("metrics", "items"):
        if upto == "layers" or (upto == "items" and name == "metrics"):
            record.delete(f"{name}/k1.parquet")
    results = load_results(record.uri)
    assert record.done() == {"k0"}
    for table in ("cells", "metrics", "items", "layers", "results"):
        assert {r["key"] for r in results.rows(f"select key from {table}")} == {"k0"}, table


def test_a_store_that_deletes_nothing_costs_no_cell(record, monkeypatch):
    """A bucket without s3:DeleteObject: the cell stood there and was called failed."""

    def refuse(path: str) -> None:
        raise OSError("AWS Error ACCESS_DENIED during DeleteObjects operation")

    monkeypatch.setattr(record, "delete_dir", refuse)
    commit(record, "k1")
    assert record.done() == {"k1"}


def test_a_folder_that_cannot_be_listed_is_one_line(record):
    Path(record.root).mkdir()
    Path(record.root, "sweeps").write_text("no folder")
    done = comptrust("status", record.root)
    assert done.returncode == 1 and done.stderr.startswith("failed: NotADirectoryError: "), done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("uri", ["", " ", "s3://", "gs://", "file:///", "s3:/bucket/x", "gs:bucket"])
def test_an_address_without_a_place_is_bad_input(uri):
    """`--results "$PLACE"` and `s3://$BUCKET` of a script whose variable is not set, or with a slash lost: the working folder, a traceback,
    a hang, a folder named "s3:"."""
    with pytest.raises(BadInput, match="results: "):
        Record(uri)


@pytest.mark.slow
def test_a_google_bucket_out_of_reach_is_an_error_within_a_minute():
    record = Record("gs://anonymous@bucket/x?endpoint_override=127.0.0.1:9&scheme=http")
    begun = time.monotonic()
    with pytest.raises(OSError, match="UNAVAILABLE"):
        record.list("cells")
    assert time.monotonic() - begun < 60  # pyarrow alone goes on for a quarter of an hour


def test_commit_replaces_and_never_appends(record):
    commit(record, "k1", 50.0)
    commit(record, "k1", 60.0)
    rows = load_results(record.uri).rows("select ethics from results")
    assert rows == [{"ethics": 60.0}]


@pytest.mark.parametrize("damage", ["truncate", "foreign", "empty"])
def test_damaged_parts_are_left_out_and_computed_again(record, damage):
    commit(record, "k0")
    commit(record, "k1")
    path = Path(record.root, "metrics", "k1.parquet")
    data = path.read_bytes()
    path.write_bytes({"truncate": data[: len(data) // 2], "foreign": b"not parquet at all", "empty": b""}[damage])
    assert record.done() == {"k0"}
    results = load_results(record.uri)
    for table in ("cells", "metrics", "items", "results"):
        assert {r["key"] for r in results.rows(f"select distinct key from {table}")} == {"k0"}
    assert results.ignored == ["cells/k1.parquet"]


def test_foreign_files_disturb_nothing(record):
    commit(record, "k1")
    for name in ("cells/.tmp-123", "cells/notes.txt", "items/.k1.parquet.swp", "README.md"):
        path = Path(record.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("?")
    pq.write_table(pa.table({"something": [1]}), f"{record.root}/cells/other.parquet")
    results = load_results(record.uri)
    assert [r["key"] for r in results.rows("select key from results")] == ["k1"]
    assert results.ignored == ["cells/other.parquet"]


def test_a_query_writes_nothing(record):
    """The folder that it may read from is the record's own."""
    commit(record, "k1")
    results = load_results(record.uri)
    part = Path(record.root, "cells", "k1.parquet")
    before = part.read_bytes()
    for sql in ("copy (select 1 as x) to '{}'", "select 1; copy (select 1) to '{}'", "explain analyze copy (select 1) to '{}'"):
        with pytest.raises(BadInput, match="read-only"):
            results.sql(sql.format(part))
    assert part.read_bytes() == before
    assert results.rows("pivot (select model, method from cells) on method using count(*)") == [{"model": "m", "rtn": 1}]


def test_foreign_files_disturb_no_folder(record):
    commit(record, "k1")
    record.fail(cell("k2", error="no", error_type="CellError"))
    record.put_json(
        "sweeps/s1.json", {"id": "s1", "name": "one", "config": {}, "keys": ["k1", "k2"], "labels": {}, "skipped": []}
    )
    for folder in ("failed", "cells", "metrics", "items", "layers"):
        pq.write_table(pa.table({"something": [1]}), f"{record.root}/{folder}/other.parquet")
    record.put("sweeps/half.json", b'{"id": "s2", "na')
    record.put("sweeps/mine.json", b"[1, 2]")
    results = load_results(record.uri)
    assert [r["key"] for r in results.rows("select key from results")] == ["k1"]
    assert [r["key"] for r in results.rows("select key from failed")] == ["k2"]
    (sweep,) = status(record.uri)["sweeps"]
    assert (sweep["done"], sweep["failed"], sweep["left"]) == (1, 1, 0)


def test_newer_schema_is_refused(record, monkeypatch):
    monkeypatch.setattr(record_module, "SCHEMA_VERSION", 0)
    commit(record, "k1")
    with pytest.raises(BadInput, match="record schema 1"):
        load_results(record.uri)


def test_unknown_columns_are_an_error():
    with pytest.raises(KeyError, match="sprasity"):
        to_table("cells", [{"key": "k", "sprasity": 0.5}])
    assert to_table("cells", [{"key": "k"}]).schema.equals(CELLS)


def test_partials_until_commit(record):
    record.put_partial("k1", "ethics", [{"dimension": "ethics", "item": "i", "sample": 0, "target": {}}])
    assert list(record.partials("k1")) == ["ethics"]
    commit(record, "k1")
    assert record.partials("k1") == {}


def test_dense_is_the_measure_of_worst_drop(record):
    commit(record, "d", 80.0, method="dense")
    commit(record, "c", 72.5)
    commit(record, "better", 85.0)
    commit(record, "elsewhere", 10.0, evaluation="other suite")
    rows = {r["key"]: r for r in load_results(record.uri).rows("select key, worst_drop, dense_key from results")}
    assert rows["c"]["worst_drop"] == pytest.approx(7.5)
    assert rows["better"]["worst_drop"] == pytest.approx(-5.0)
    assert rows["d"]["worst_drop"] == 0
    assert rows["elsewhere"]["worst_drop"] is None


def test_compact_changes_no_answer(record):
    commit(record, "d", 80.0, method="dense")
    for n in range(5):
        commit(record, f"k{n}", 50.0 + n)
    ask = "select * from results order by key"
    before = load_results(record.uri).rows(ask)
    counts = "select (select count(*) from items) i, (select count(*) from metrics) m, (select count(*) from layers) l"
    counted = load_results(record.uri).rows(counts)
    merged, removed = compact(record.uri)
    assert (merged, removed) == (6, 24)
    assert record.list("cells") == []
    assert load_results(record.uri).rows(ask) == before
    assert load_results(record.uri).rows(counts) == counted
    assert record.done() == {"d", *(f"k{n}" for n in range(5))}
    assert compact(record.uri) == (0, 0)
    # more cells later: parts beside a generation, then both merged
    commit(record, "k9", 99.0)
    assert len(load_results(record.uri).rows(ask)) == 7
    assert compact(record.uri) == (1, 4)
    rows = load_results(record.uri).rows(ask)
    assert len(rows) == 7 and [r for r in rows if r["key"] != "k9"] == before


def test_compact_interrupted_before_removal_shows_each_cell_once(record, monkeypatch):
    commit(record, "k1")
    parts = {p: record.get(p) for t in ("cells", "metrics", "items", "layers") for p in record.list(t)}
    compact(record.uri)
    for path, data in parts.items():  # as if the crash came before the parts were removed
        record.put(path, data)
        os.utime(f"{record.root}/{path}", (0, 0))
    results = load_results(record.uri)
    assert results.rows("select count(*) n from cells") == [{"n": 1}]
    assert results.rows("select count(*) n from items") == [{"n": 3}]
    assert compact(record.uri) == (0, 4)


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_a_reader_beside_a_compaction_misses_nothing(record, generation, asked):
    commit(record, "d", 80.0, method="dense")
    if generation:
        compact(record.uri)
    commit(record, "k1")
    results = load_results(record.uri)
    if asked:
        results.rows("select * from results")
    compact(record.uri)
    for table, n in (("items", 6), ("metrics", 10), ("layers", 2), ("cells", 2), ("results", 2)):
        assert results.rows(f"select count(*) n, count(distinct key) keys from {table}") == [{"n": n, "keys": 2}]
    assert not results.ignored


def test_opening_beside_a_compaction_finds_all_cells(record, monkeypatch):
    commit(record, "d", method="dense")
    compact(record.uri)
    commit(record, "k1")
    listed = Record.parts

    def parts(self):
        found = listed(self)
        monkeypatch.undo()
        compact(record.uri)  # the generation that is read next goes
        return found

    monkeypatch.setattr(Record, "parts", parts)
    assert load_results(record.uri).rows("select count(*) n from cells") == [{"n": 2}]


def test_of_two_compactions_at_once_the_later_gives_up(record, monkeypatch):
    commit(record, "k1")
    compacted = compact

    def meanwhile(_):
        monkeypatch.undo()
        compacted(record.uri)

    monkeypatch.setattr("comptrust.sweep.launch.check_writable", meanwhile)
    with pytest.raises(BadInput, match="another compaction"):
        compact(record.uri)
    results = load_results(record.uri)
    assert results.rows("select count(*) n from items") == [{"n": 3}]
    assert results.rows("select key from results") == [{"key": "k1"}]
    assert len(record.list("compact/items")) == 1


def test_compacting_foreign_files_leaves_a_record_that_is_read(record):
    for name in ("cells", "metrics", "items", "layers"):
        record.put_table(f"{name}/k1.parquet", pa.table({"x": [1]}))
    compact(record.uri)
    assert load_results(record.uri).rows("select key from results") == []


def test_failed_rows_until_success(record):
    record.fail(cell("k1", attempts=1, error_type="CellError", error="singular"))
    record.fail(cell("k1", attempts=2, error_type="OutOfMemoryError", error="no memory"))
    assert record.done() == set()
    rows = load_results(record.uri).rows("select key, error_type, attempts, status from failed")
    assert rows == [{"key": "k1", "error_type": "OutOfMemoryError", "attempts": 2, "status": "failed"}]
    commit(record, "k1")
    assert load_results(record.uri).rows("select key from failed") == []


def test_cells_of_a_model_that_was_moved_keep_their_dense_cell(record):
    """Its dense cell is not computed again, and what came after the move was compared with nothing."""
    commit(record, "d", 80.0, method="dense")
    commit(record, "other", 60.0, method="dense", model="m2")  # records that were made by hand may have one revision for all
    commit(record, "k1", 70.0)
    commit(record, "k2", 65.0, model="/moved/m")
    commit(record, "k3", 65.0, model="/moved/m", revision="r2")
    for _ in range(2):
        rows = load_results(record.uri).rows("select key, model, dense_key, worst_drop from results order by key")
        assert [tuple(r.values()) for r in rows] == [
            ("d", "m", "d", 0.0), ("k1", "m", "d", 10.0), ("k2", "m", "d", 15.0), ("k3", "/moved/m", None, None),
            ("other", "m2", "other", 0.0),
        ]  # fmt: skip
        compact(record.uri)


def test_the_failure_of_the_last_run_is_told(record):
    """A later run counts its attempts from 1 again: the third of the run before, cured since, was told instead."""
    row = cell("k1", attempts=3, error_type="WorkerDied", error="out of memory")
    record.fail(row)
    now = row["finished_at"] + timedelta(minutes=1)
    record.fail({**row, "attempts": 1, "error_type": "CellError", "error": "singular", "finished_at": now})
    record.put_json("sweeps/s1.json", {"id": "s1", "name": "s", "config": {}, "keys": ["k1"], "labels": {}, "skipped": []})
    assert load_results(record.uri).rows("select error from failed") == [{"error": "singular"}]
    assert [f["error"] for f in status(record.uri)["sweeps"][0]["failures"]] == ["singular"]


def test_sql_cannot_read_or_write_elsewhere(record, tmp_path):
    commit(record, "k1")
    (tmp_path / "secret.csv").write_text("a\n1\n")
    results = load_results(record.uri)
    for sql in (
        f"select * from read_csv('{tmp_path}/secret.csv')",
        f"copy (select 1) to '{tmp_path}/out.csv'",
        "select * from nowhere",
    ):
        with pytest.raises(BadInput, match="SQL"):
            results.rows(sql)
    assert not (tmp_path / "out.csv").exists()


def test_query_answers_in_json_numbers(record, capsys):
    """What SQL gives as a decimal (a sum of integers, above all) is a number; what is none (infinite, not a number) is null."""
    for key, bits in (("k1", 4), ("k2", 3)):
        commit(record, key, bits=bits)
    sql = "select sum(bits) as sum, avg(bits) as mean, 0.5 as half, 1e0 / 0 as far, corr(bits, 0) as none, [1.5] as list from results"
    query(record.uri, sql, Format.json)
    assert json.loads(capsys.readouterr().out) == [
        {"sum": 7, "mean": 3.5, "half": 0.5, "far": None, "none": None, "list": [1.5]}
    ]


def test_query_without_rows_still_names_its_columns_in_csv(record, capsys):
    commit(record, "k1", bits=4)
    query(record.uri, "select key, bits from results where bits < 4", Format.csv)
    query(record.uri, "select key, bits from results", Format.csv)
    assert capsys.readouterr().out.splitlines() == ["key,bits", "key,bits", "k1,4"]


def test_columns_of_one_name_are_all_kept(record, capsys):
    """A join names both sides' columns alike; SQL names tables in any case."""
    commit(record, "k1", bits=4)
    commit(record, "k2", bits=3)
    sql = "SELECT a.key, b.key, b.bits FROM CELLS a JOIN Results b ON a.bits > b.bits"
    query(record.uri, sql, Format.csv)
    assert capsys.readouterr().out.splitlines() == ["key,key_2,bits", "k1,k2,3"]
    query(record.uri, sql, Format.json)
    assert json.loads(capsys.readouterr().out) == [{"key": "k1", "key_2": "k2", "bits": 3}]


@pytest.mark.parametrize("read", [load_results, status])
def test_a_store_that_does_not_answer_is_one_clear_error(read, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    with pytest.raises(BadInput, match=r"RESULTS: cannot read 's3://.*127\.0\.0\.1.*Check the address"):
        read("s3://bucket/x?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1")


@pytest.mark.parametrize("secret", ["hush", "hush/hush+hush", "hu:sh"])
def test_secrets_in_an_address_are_refused_unseen(secret):
    with pytest.raises(BadInput, match=r"results: s3://\.\.\.@bucket/x\S* holds a password.*AWS_SECRET_ACCESS_KEY") as e:
        Record(f"s3://me:{secret}@bucket/x?region=us-east-1")
    assert "hu" not in str(e.value)


@pytest.mark.parametrize("place", ["results/a:b@c", "hdfs://host:8020/runs@home", "s3://[x"])
def test_other_addresses_hold_no_secret(place):
    try:
        Record(place)
    except BadInput as e:  # no such file system here
        assert "cannot open" in str(e)


def test_key_prefix(record):
    commit(record, "abc1")
    commit(record, "abd1")
    results = load_results(record.uri)
    assert results.find("abc") == "abc1"
    with pytest.raises(BadInput, match="fits 2"):
        results.find("ab")
    with pytest.raises(BadInput, match="no cell"):
        results.find("zz")


def test_a_failed_cell_is_named_with_its_error(record):
    """`export` and `compare` said that there is no such cell, whose key `status` shows."""
    commit(record, "abc1")
    for attempt, error in ((1, "no memory"), (2, "singular Hessian")):
        record.fail({"key": "abf1", "method": "gptq", "attempts": attempt, "error_type": "CellError", "error": error})
    results = load_results(record.uri)
    with pytest.raises(BadInput, match="cell abf1 failed, CellError: singular Hessian"):
        results.find("abf")
    assert results.find("ab") == "abc1"


def test_empty_place_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no results"):
        load_results(tmp_path)


def test_object_store(bucket):
    """The same record on S3 (moto's server): commit, read, compact."""
    remote = Record(bucket)
    commit(remote, "d", 80.0, method="dense")
    commit(remote, "k1", 70.0)
    assert remote.done() == {"d", "k1"}
    before = load_results(bucket).rows("select key, ethics, worst_drop from results order by key")
    assert [r["worst_drop"] for r in before] == [0, 10]
    assert compact(bucket) == (2, 8)
    assert load_results(bucket).rows("select key, ethics, worst_drop from results order by key") == before
    assert load_results(bucket).items(["k1"]).num_rows == 3
