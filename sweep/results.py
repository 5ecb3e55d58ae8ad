"""The record as tables: DuckDB over the part files and the compacted ones, with the wide view ``results``.

Only committed cells are read (``cells/<key>.parquet`` exists or a compacted generation lists it); a key that stands in several places
is read once, newest generation first. Truncated and foreign files are left out and named in ``Results.ignored``.
"""

from __future__ import annotations

import io
import itertools
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from ..actors.cell import DIMENSIONS
from ..actors.errors import BadInput
from ..actors.record import TABLES, Record, check_version

#: Metrics of the view ``results`` that are no dimension: column -> (dimension, metric) in table ``metrics``.
EXTRA = {
    "perplexity": ("utility", "perplexity"),
    "mmlu": ("utility", "mmlu"),
    "kl_dense": ("divergence", "kl_dense"),
    "top1_agreement": ("divergence", "top1_agreement"),
    "flips": ("divergence", "flips"),
}


def load_results(uri: str | Path) -> Results:
    """Open a results folder or URI. ``BadInput`` if nothing is recorded there or a newer comptrust wrote it."""
    return Results(Record(uri))


#: Statements that write nothing; MULTI is a PIVOT. COPY could overwrite parts of the record.
READS = (duckdb.StatementType.SELECT, duckdb.StatementType.MULTI)
#: Part files that one query reads.
FILES_AT_ONCE = 500


class Results:
    """Read access to one record. SQL sees ``cells metrics items layers failed results``; tables load when first used."""

    def __init__(self, record: Record) -> None:
        record.check_readable()
        self.record = record
        try:
            self._open()
        except FileNotFoundError:  # a compaction beside us removed what was listed
            self._open()

    def _open(self) -> None:
        """List what is there; no table is loaded. Parts before generations: what a compaction removes stands in a generation already."""
        record = self.record
        self.ignored: list[str] = []
        whole = record.parts()
        self.generations = _generations(record)
        self.db = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
        self.db.execute("SET enable_progress_bar = false")
        self._loaded: set[str] = set()
        self._keys = self._part_keys(whole)
        if not self._keys and not self.generations and not record.list("failed") and not record.list("sweeps", ".json"):
            raise BadInput(
                f"no results in {record.uri!r}", where="RESULTS", fix="Give the folder that `comptrust run` printed."
            )
        for gen in self.generations:
            check_version(_read_schema(record, f"compact/cells/{gen}.parquet"), f"{record.uri}/compact/cells/{gen}.parquet")
        if self._keys:
            # One part speaks for its writer's version; a damaged one is left to the loader, which reports it.
            record.get_table(f"cells/{self._keys[-1]}.parquet")
        if record.local:
            self.db.execute(f"SET allowed_directories = ['{record.root.replace(chr(39), chr(39) * 2)}/']")
        self.db.execute("SET enable_external_access = false")

    # -- queries ------------------------------------------------------------------------------------------------------

    def sql(self, query: str, params: Sequence[Any] | None = None) -> pa.Table:
        """The answer of one read-only DuckDB query; ``BadInput`` for SQL that does not run, or that does more than read."""
        ignored = len(self.ignored)
        try:
            answer = self._ask(query, params)
            if len(self.ignored) == ignored or not self._compacted():
                return answer
        except (BadInput, duckdb.Error, FileNotFoundError):
            if not self._compacted():
                raise
        self._open()  # a compaction beside us moved what was listed: all is there, elsewhere
        return self._ask(query, params)

    def _compacted(self) -> bool:
        """Whether a compaction has ended since the record was opened."""
        return _generations(self.record) != self.generations

    def _ask(self, query: str, params: Sequence[Any] | None) -> pa.Table:
        self._load_named(query)
        try:
            reads = all(s.type in READS for s in self.db.extract_statements(query))
            relation = self.db.sql(query, params=list(params) if params else None) if reads else None
            if relation is None:
                raise BadInput("not a query", where="SQL", fix="Write a SELECT; the record is read-only.")
            return _distinct_columns(relation.to_arrow_table())
        except duckdb.Error as e:
            problem, _, rest = str(e).strip().partition("\n")
            # DuckDB knows the tables that are loaded, and of them the columns
            near = re.search(r'Candidate bindings:?: "([^"]+)"', rest)
            fix = f"Did you mean {near[1]}?" if near else "Tables: cells metrics items layers failed results."
            raise BadInput(problem.rstrip("!"), where="SQL", fix=fix) from e

    def rows(self, query: str, params: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        return self.sql(query, params).to_pylist()

    def items(self, keys: Sequence[str] | None = None) -> pa.Table:
        """Table ``items``, of all cells or of ``keys``."""
        if keys is None:
            return self.sql("select * from items")
        return self.sql("select * from items where key in (select unnest(?::varchar[]))", [list(keys)])

    def find(self, prefix: str) -> str:
        """The key that starts with ``prefix``; ``BadInput`` if there is none or more than one."""
        keys = [r["key"] for r in self.rows("select key from cells where starts_with(key, ?) order by key limit 9", [prefix])]
        if len(keys) == 1:
            return keys[0]
        if not keys:
            failed = "select key, error_type, error from failed where starts_with(key, ?) order by key limit 1"
            for row in self.rows(failed, [prefix]):
                raise BadInput(
                    f"cell {row['key']} failed, {row['error_type']}: {row['error']}",
                    where="CELL",
                    fix="Run the sweep again once the cause is gone: it tries this cell again.",
                )
            raise BadInput(
                f"no cell {prefix!r}",
                where="CELL",
                fix='List them: comptrust query RESULTS "select key, method, bits from results"',
            )
        raise BadInput(f"{prefix!r} fits {len(keys)} cells or more: {', '.join(keys)}", where="CELL", fix="Give more digits.")

    @property
    def columns(self) -> list[str]:
        """Columns of the view ``results``."""
        return [r["column_name"] for r in self.rows("describe results")]

    def _load_named(self, query: str) -> None:
        text = query.lower()  # SQL knows no case in names
        for name in (*TABLES, "failed", "results"):
            if name in text:
                self._load(name)

    # -- loading ------------------------------------------------------------------------------------------------------

    def _part_keys(self, whole: set[str]) -> list[str]:
        compacted = _generation_keys(self.record, self.generations) if whole else set()
        self.ignored += [p for p in self.record.list("cells") if Path(p).stem not in whole]
        return sorted(whole - compacted)

    def _load(self, name: str) -> None:
        if name in self._loaded:
            return
        self._loaded.add(name)
        if name == "results":
            for needed in ("cells", "metrics"):
                self._load_source(needed, view=False)
            self._load_source("wide", view=False)
            self.db.execute(_results_view(bool(self.generations)))
        elif name == "failed":
            self._load_failed()
        else:
            self._load_source(name, view=True)

    def _load_source(self, name: str, view: bool) -> None:
        """``part_<name>``: rows of part files; ``gen_<name>``: rows of compacted generations; ``<name>``: both."""
        if f"part_{name}" not in self._loaded:
            self._loaded.add(f"part_{name}")
            if name != "wide":
                self._parts_view(name)
            if self.generations:
                self._generation_view(name)
        if view:
            union = f"select * from part_{name}" + (f" union all by name select * from gen_{name}" if self.generations else "")
            self.db.execute(f"create or replace view {name} as {union}")

    def _parts_view(self, name: str) -> None:
        if self._keys and self.record.local:
            files = ["'" + f"{self.record.root}/{name}/{k}.parquet".replace("'", "''") + "'" for k in self._keys]
            into = f"create table part_{name} as"
            try:
                # A table, not a view: a compaction beside us may remove the parts between two queries. Of every file that a query
                # names DuckDB keeps what its footer says.
                for start in range(0, len(files), FILES_AT_ONCE):
                    some = ", ".join(files[start : start + FILES_AT_ONCE])
                    self.db.execute(f"{into} select * from read_parquet([{some}], union_by_name = true)")
                    into = f"insert into part_{name} by name"
                if self.db.table(f"part_{name}").columns == TABLES[name].names:
                    return
            except duckdb.Error:
                pass
            self.db.execute(f"drop table if exists part_{name}")  # some part is damaged or foreign: read one by one
        self.db.register(f"arrow_{name}", pa.concat_tables([TABLES[name].empty_table(), *self.read_parts(name)]))
        self.db.execute(f"create table part_{name} as select * from arrow_{name}")

    def read_parts(self, name: str) -> Iterator[pa.Table]:
        """Part files of a table, some hundred at once; those that are damaged or foreign are listed in ``ignored``."""
        schema = TABLES[name]

        def read(key: str) -> pa.Table | None:
            table = self.record.get_table(f"{name}/{key}.parquet")
            if table is None or set(schema.names) - set(table.column_names):
                self.ignored.append(f"{name}/{key}.parquet")
                return None
            return table.select(schema.names).cast(schema)

        with ThreadPoolExecutor(16) as pool:
            for start in range(0, len(self._keys), FILES_AT_ONCE):
                parts = [t for t in pool.map(read, self._keys[start : start + FILES_AT_ONCE]) if t is not None]
                if parts:
                    yield pa.concat_tables(parts)

    def _generation_view(self, name: str) -> None:
        """Newest generation whole, older ones without the keys of newer ones."""
        selects = []
        for n, gen in enumerate(self.generations):
            path = f"compact/{name}/{gen}.parquet"
            if self.record.local:
                source = "read_parquet('" + f"{self.record.root}/{path}".replace("'", "''") + "')"
            else:
                source = f"arrow_{name}_{n}"
                with self.record.fs.open_input_file(f"{self.record.root}/{path}") as f:
                    self.db.register(source, pq.read_table(f))
            newer = " union all ".join(f"select key from gen_cells_{m}" for m in range(n))
            where = f" where key not in ({newer})" if newer else ""
            if name == "cells":
                self.db.execute(f"create or replace view gen_cells_{n} as select * from {source}")
            elif n and "part_cells" not in self._loaded:
                self._load_source("cells", view=False)
            selects.append(f"select * from {source}{where}")
        self.db.execute(f"create or replace view gen_{name} as " + " union all by name ".join(selects))

    def _load_failed(self) -> None:
        """Latest failed attempt of each cell that has not succeeded since."""
        self._load("cells")
        self.db.register("arrow_failed", self.record.failures())
        self.db.execute(
            "create table failed as select * from arrow_failed where key not in (select key from cells)"
            " qualify row_number() over (partition by key order by finished_at desc, attempts desc) = 1"
        )


def _distinct_columns(table: pa.Table) -> pa.Table:
    """Columns of one name (of a join) numbered from the second on, ``key_2``: rows as dicts would hold the last alone."""
    names: list[str] = []
    for name in table.column_names:
        number = next(n for n in itertools.count(1) if (name if n == 1 else f"{name}_{n}") not in names)
        names.append(name if number == 1 else f"{name}_{number}")
    return table.rename_columns(names)


def _pivot() -> str:
    """Metrics of convention ``comptrust`` as columns, one row a cell."""
    pick = "max(value) filter (where dimension = '{}' and metric = '{}') as \"{}\""
    columns = [pick.format(d, m, c) for c, (d, m) in EXTRA.items()]
    for d in DIMENSIONS:
        columns += [pick.format(d, "score", d), pick.format(d, "refusal", f"{d}_refusal")]
        columns.append(f"coalesce(max(value) filter (where dimension = '{d}' and metric = 'valid') > 0, false) as {d}_valid")
    return f"select key, {', '.join(columns)} from part_metrics where convention = 'comptrust' and scenario = '' group by key"


def _wide() -> str:
    return f"select c.*, m.* exclude (key) from part_cells c left join ({_pivot()}) m on m.key = c.key"


def _results_view(generations: bool) -> str:
    """A model that the sweep names otherwise by now (moved, ``@revision`` added) is the same by its revision: its later cells bear the
    name of their dense cell, which was not computed again. A cell is superseded once its configuration was computed anew, for a
    repaired method or another text of the same name (as in `effects.configurations`)."""
    wide = _wide() + (" union all by name select * from gen_wide" if generations else "")
    trust = " + ".join(DIMENSIONS)
    valid = " and ".join(f"coalesce({d}_valid, false)" for d in DIMENSIONS)
    drops = ", ".join(f"d.{d} - w.{d}" for d in DIMENSIONS)
    # A dimension that fell silent has no drop to compare; without it the rest would make a collapsed cell look harmless.
    silenced = " or ".join(f"(d.{d} is not null and w.{d} is null and w.{d}_refusal is not null)" for d in DIMENSIONS)
    names = ("model revision dtype evaluation method bits group_size sparsity pattern params backend template calibration samples seqlen"
             " seed")  # fmt: skip
    alike = f"hash({', '.join(f'wide.{name}' for name in names.split())})"
    return f"""
    create or replace view results as
    with written as ({wide}),
    homes as (
      select revision, dtype, evaluation, max_by(model, finished_at) as home, list(model) as names from written where method = 'dense'
      group by all
    ),
    wide as (
      select w.* replace (case when list_contains(h.names, w.model) then w.model else coalesce(h.home, w.model) end as model)
      from written w left join homes h using (revision, dtype, evaluation)
    ),
    dense as (
      select * from wide where method = 'dense'
      qualify row_number() over (partition by model, revision, dtype, evaluation order by finished_at desc, key) = 1
    ),
    newest as (
      select {alike} as config, max(finished_at) as finished_at from wide where status = 'done'
      group by all having min(finished_at) < max(finished_at)
    )
    select w.*, ({trust.replace("toxicity", "w.toxicity").replace(" + ", " + w.")}) / {len(DIMENSIONS)} as trust,
      {valid.replace("coalesce(", "coalesce(w.")} as valid,
      case when d.key is null or {silenced} then null else greatest({drops}) end as worst_drop,
      d.key as dense_key,
      coalesce(w.status = 'done' and w.finished_at < newest.finished_at, false) as superseded
    from wide w left join dense d on d.model = w.model and d.revision is not distinct from w.revision
      and d.dtype is not distinct from w.dtype and d.evaluation is not distinct from w.evaluation
      left join newest on newest.config = {alike.replace("wide.", "w.")}
    """


# -- compaction -------------------------------------------------------------------------------------------------------


def _generations(record: Record) -> list[str]:
    """Committed generations, newest first."""
    return sorted((Path(p).stem for p in record.list("compact/cells")), reverse=True)


def _generation_keys(record: Record, generations: Sequence[str]) -> set[str]:
    keys: set[str] = set()
    for gen in generations:
        with record.fs.open_input_file(f"{record.root}/compact/cells/{gen}.parquet") as f:
            keys.update(pq.read_table(f, columns=["key"]).column("key").to_pylist())
    return keys


def _marked(record: Record) -> dict[str, int]:
    """When the mark of the newest generation that holds it was written, by key."""
    times: dict[str, int] = {}
    for path, written in sorted(record.written("compact/cells").items()):
        times |= dict.fromkeys(_generation_keys(record, [Path(path).stem]), written)
    return times


def _written(results: Results) -> dict[str, int]:
    """When the parts that are merged were last written."""
    keys = set(results._keys)
    return {p: t for name in TABLES for p, t in results.record.written(name).items() if Path(p).stem in keys}


def _read_schema(record: Record, path: str) -> pa.Schema:
    with record.fs.open_input_file(f"{record.root}/{path}") as f:
        return pq.read_schema(f)


def compact(uri: str | Path) -> tuple[int, int]:
    """Merge part files into one generation and remove what was read. Returns (cells merged, part files removed).

    The generation's ``cells`` file is written last and is its commit mark; a crash before it changes nothing, one after it leaves
    parts that readers know to be read already and that the next ``compact`` removes. Parts younger than the mark are those of a
    ``rescore`` under way, and stay.
    """
    from .launch import check_writable

    results = load_results(uri)
    check_writable(record := results.record)
    parts = _written(results)
    merged = len(results._keys)
    old = list(results.generations)
    removed = 0
    if merged or len(old) > 1:
        gen = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        try:
            _write_merged(results, gen, parts)
        except (duckdb.Error, FileNotFoundError):
            if not _moved(results, parts):
                raise
            for name in (*TABLES, "wide"):
                record.delete(f"compact/{name}/{gen}.parquet")
            raise BadInput("another compaction or a rescoring ended meanwhile", where="RESULTS", fix="Run it again.") from None
        for name in (*TABLES, "wide"):
            for g in old:
                record.delete(f"compact/{name}/{g}.parquet")
    marked = _marked(record)
    for name in ("cells", "metrics", "items", "layers"):  # the mark first: parts without it are ignored
        for path, written in record.written(name).items():
            if written <= marked.get(Path(path).stem, -1) and path not in results.ignored:
                record.delete(path)
                removed += 1
    return merged, removed


def _moved(results: Results, parts: dict[str, int]) -> bool:
    """Whether what is merged was compacted or written anew since."""
    return results._compacted() or _written(results) != parts


def _write_merged(results: Results, gen: str, parts: dict[str, int]) -> None:
    """All tables of a generation, ``cells`` last. ``FileNotFoundError`` if what was to be read was removed or written anew."""
    record, old = results.record, results.generations
    results._load("results")
    for name in ("layers", "items", "metrics"):
        before: Iterable[Any] = ()
        if old:
            results._generation_view(name)
            before = results.db.sql(f"select * from gen_{name}").to_arrow_reader(100_000)
        _write_generation(record, name, gen, itertools.chain(before, results.read_parts(name)))
    wide = _wide() + (" union all by name select * from gen_wide" if old else "")
    reader = results.db.sql(wide).to_arrow_reader(100_000)
    _write_generation(record, "wide", gen, itertools.chain(reader, [reader.schema.empty_table()]))
    results._load("cells")
    if _moved(results, parts):  # before the mark: parts may have gone, or been judged anew, before they were read
        raise FileNotFoundError
    _write_generation(record, "cells", gen, results.db.sql("select * from cells").to_arrow_reader(100_000))


def _write_generation(record: Record, name: str, gen: str, batches: Iterable[pa.Table | pa.RecordBatch]) -> None:
    """One table of a generation. The columns are those of the first batch; a table without rows has its own."""
    sink, writer = io.BytesIO(), None
    for batch in itertools.chain(batches, [TABLES[name].empty_table()] if name in TABLES else []):
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        if writer is None:
            meta = {**(table.schema.metadata or {}), **(TABLES["cells"].metadata or {})}
            writer = pq.ParquetWriter(sink, table.schema.with_metadata(meta), compression="zstd")
        writer.write_table(table.select(writer.schema.names).cast(writer.schema))
    if writer is not None:
        writer.close()
    record.put(f"compact/{name}/{gen}.parquet", sink.getvalue())
