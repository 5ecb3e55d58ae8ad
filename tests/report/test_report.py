"""The file itself: whole, self-contained, inside its budget, and clear where there is nothing to show."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comptrust import load_results
from comptrust.actors.errors import BadInput
from comptrust.sweep import report
from comptrust.sweep.effects import Effects
from comptrust.sweep.frontier import pareto
from comptrust.sweep.importer import import_table
from comptrust.sweep.report_data import name_cells, rate, sort_key
from comptrust.sweep.report_items import BUDGET, explore
from hypothesis import given
from hypothesis import strategies as st


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: dict[str, str] = {}
        self._open = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs).get("id") or tag

    def handle_data(self, data):
        self.text[self._open] = self.text.get(self._open, "") + data


@pytest.fixture(scope="module")
def tags(page) -> Tags:
    parser = Tags()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_page_is_small_and_refers_to_nothing_outside(page, tags):
    assert page.stat().st_size < 5_000_000
    for tag, attrs in tags.tags:
        assert tag not in {"iframe", "object", "embed", "img", "base", "form"}
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            if name in attrs:
                assert attrs[name].startswith(("#", "data:")), (tag, attrs)
        assert not any(name.startswith("on") or name == "style" for name in attrs), (tag, attrs)


def test_policy_holds_the_digests_of_script_and_style(page, tags):
    policy = next(a["content"] for t, a in tags.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = page.read_text(encoding="utf-8")
    for block, name in (
        (re.search("<style>(.*?)</style>", text, re.S)[1], "style-src"),
        (re.findall("<script>(.*?)</script>", text, re.S)[-1], "script-src"),
    ):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy


def test_hostile_text_is_nowhere_markup(page, tags, synthetic):
    text = page.read_text(encoding="utf-8")
    for hostile in synthetic.HOSTILE[:3]:
        assert hostile not in text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\u2028\u2029\x00]", text)
    assert [t for t, _ in tags.tags].count("script") == 2


def test_page_scripts_write_text_only():
    folder = Path(report.__file__).parent
    for path in folder.glob("report*.js"):
        source = path.read_text(encoding="utf-8")
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
            assert sink not in source, (path.name, sink)


def test_names_of_cells_differ_within_a_model(record):
    rows = load_results(record).rows("select * from results")
    names = list(zip((r["model"] for r in rows), name_cells(rows), strict=True))
    assert len(set(names)) == len(names)


@given(st.data())
def test_names_differ_whatever_differs(data):
    columns = {
        "method": st.sampled_from(["gptq", "wanda", "dense", "nf4"]),
        "bits": st.sampled_from([None, 3, 4]),
        "group_size": st.sampled_from([None, -1, 64]),
        "sparsity": st.sampled_from([None, 0.5]),
        "pattern": st.sampled_from([None, "2:4", "unstructured"]),
        "seed": st.sampled_from([None, 0, 1]),
        "samples": st.sampled_from([None, 128]),
        "seqlen": st.sampled_from([None, 2048]),
        "calibration": st.sampled_from([None, "c4", "builtin"]),
        "backend": st.sampled_from(["comptrust", "autoawq"]),
        "dtype": st.just("float16"),
        "suite": st.sampled_from(["smoke", "full"]),
        "evaluation": st.sampled_from(["e1", "e2"]),
        "template": st.sampled_from([None, "", "abcdefgh"]),
        "revision": st.just("r"),
        "params": st.just("{}"),
        "model": st.sampled_from(["a", "b"]),
    }
    rows = [{"key": f"{i:08d}", **row} for i, row in enumerate(data.draw(st.lists(st.fixed_dictionaries(columns), max_size=8)))]
    names = list(zip((r["model"] for r in rows), name_cells(rows), strict=True))
    assert len(set(names)) == len(rows)
    sorted(rows, key=sort_key)


def test_rates_go_from_mild_to_strong():
    def row(method, bits=None, sparsity=None, pattern=None):
        return {"method": method, "bits": bits, "sparsity": sparsity, "pattern": pattern}

    order = [row("dense"), row("gptq", 8), row("nf4"), row("gptq", 3)]
    order += [row("wanda", None, share, "unstructured") for share in (0.25, 0.5)]
    order += [row("wanda", None, 0.5, "4:8"), row("wanda", None, 0.5, "2:4"), row("wanda", 8, 0.5, "1:2")]
    order += [row("wanda", None, 0.6, "unstructured")]
    assert [rate(r)[0] for r in order] == ["dense", "8-bit", "4-bit", "3-bit", "25%", "50%", "4:8", "2:4", "1:2", "60%"]
    assert sorted(order, key=lambda r: rate(r)[1]) == order


def test_page_data_are_the_record(page, record):
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])
    results = load_results(record)
    effects = Effects(results)
    rows = {r["key"]: r for r in results.rows("select * from results")}
    assert {c["key"] for c in data["cells"]} == set(rows)
    for cell in data["cells"]:
        row = rows[cell["key"]]
        assert cell["v"]["size_bytes"] == pytest.approx(row["size_bytes"] / 1e9, abs=1e-5)
        for dim, (score, valid, refusal, delta, low, high, p, mark, _) in zip(data["dims"], cell["d"], strict=True):
            assert score == pytest.approx(row[dim["id"]], abs=1e-4)
            assert (valid, refusal) == (row[f"{dim['id']}_valid"], pytest.approx(row[f"{dim['id']}_refusal"], abs=1e-4))
            effect = effects.of(cell["key"]).get(dim["id"])
            if effect is None or effect.delta is None:
                assert delta is None
                continue
            assert (delta, low, high, p) == tuple(
                pytest.approx(v, abs=1e-4) for v in (effect.delta, effect.low, effect.high, effect.p_holm)
            )
            assert (mark in ("worse", "better")) == (effect.p_holm < 0.05)


def test_draws_of_the_page_give_the_probabilities_of_the_command(page, record):
    """The page's draws, replayed here with a brute-force frontier, agree with ``comptrust pareto`` within sampling error."""
    import numpy as np

    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])
    draws, cells = data["draws"], data["cells"]
    noise = np.frombuffer(base64.b64decode(draws["data"]), np.int8).reshape(len(cells), len(draws["metrics"]), draws["count"])
    scale = np.array(draws["scale"]).reshape(len(cells), len(draws["metrics"]))
    source = np.frombuffer(base64.b64decode(draws["source"]), "<i2").reshape(draws["count"], len(cells))
    trust = draws["metrics"].index("trust")
    there = [i for i, c in enumerate(cells) if c["v"]["trust"] is not None]
    hits = np.zeros(len(cells))
    for n in range(draws["count"]):
        points = [
            (cells[s]["v"]["size_bytes"], -(cells[s]["v"]["trust"] + noise[s, trust, n] / 127 * scale[s, trust]), i)
            for i, s in enumerate(source[n])
            if i in there
        ]
        for x, y, i in points:
            hits[i] += not any(a <= x and b <= y and (a, b) != (x, y) for a, b, _ in points)
    found = pareto(load_results(record), minimise=["size_bytes"], maximise=["trust"], draws=400)
    expected = {r["key"]: r["probability"] for r in found.rows()}
    for i in there:
        if expected[cells[i]["key"]] is not None:
            assert hits[i] / draws["count"] == pytest.approx(expected[cells[i]["key"]], abs=0.1)


def test_answers_keep_their_budget(record):
    results = load_results(record)
    rows = results.rows("select * from results order by key")
    found = explore(results, rows, [])
    assert sum(len(t.encode()) for t in found["texts"]) < BUDGET
    kinds = {(r[5], r[6]) for r in found["rows"]}
    assert any(a != b for a, b in kinds)
    names = found["outcomes"]
    for row in found["rows"]:
        assert row[12] or names[row[6]] in ("correct", "wrong", "refused", "empty")


def test_answers_of_which_only_hashes_were_kept(record, tmp_path, synthetic):
    from comptrust.actors.record import Record

    kept = Record(tmp_path / "hashes")
    for spec in (synthetic.specs()[0], synthetic.specs()[3]):
        rows = synthetic.answers(spec, 12)
        kept.commit(
            synthetic.cell_row(spec), synthetic.measured(rows, spec, intervals=False), [{**r, "text": None} for r in rows]
        )
    path = report.build(load_results(tmp_path / "hashes"), tmp_path / "r.html")
    assert "Text was not kept" in path.read_text(encoding="utf-8")


def test_failed_cells_only_is_bad_input(synthetic, tmp_path):
    from comptrust.actors.record import Record

    spec = synthetic.specs()[1]
    Record(tmp_path).fail({**synthetic.cell_row(spec), "error_type": "CellError", "error": "no memory", "attempts": 1})
    with pytest.raises(BadInput, match="only 1 failed cell"):
        report.build(load_results(tmp_path), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_target_that_is_a_folder_or_cannot_be_written(record, tmp_path):
    with pytest.raises(BadInput, match="is a folder"):
        report.build(load_results(record), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write"):
        report.build(load_results(record), tmp_path / "file" / "report.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_record_without_a_dense_cell_still_has_a_page(synthetic, tmp_path):
    from comptrust.actors.record import Record

    spec = synthetic.specs()[3]
    rows = synthetic.answers(spec, 12)
    Record(tmp_path / "one").commit(synthetic.cell_row(spec), synthetic.measured(rows, spec, intervals=False), rows)
    text = report.build(load_results(tmp_path / "one"), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Nothing to recommend" in text
    assert "No claim can be checked" in text


PUBLISHED = Path(os.environ.get("COMPTRUST_DATA") or "/nonexistent").parent / "published"


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published tables beside COMPTRUST_DATA")
@pytest.mark.parametrize(
    ("file", "format"),
    [("comp_trust_num_sheet.csv", "comp-trust-sheet"), ("beyond_perplexity_summary.csv", "beyond-perplexity")],
)
def test_published_tables_have_a_page_that_draws(open_page, tmp_path, file, format):
    cells = import_table(PUBLISHED / file, tmp_path / "published", format)
    path = report.build(load_results(tmp_path / "published"), tmp_path / "r.html")
    browser = open_page(path)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.querySelectorAll('#heat tr[data-cell]').length") == cells
    if format == "comp-trust-sheet":
        alarms = browser.execute_script("return document.getElementById('alarms').textContent")
        for score in ("toxicity 49.8 at 8-bit", "stereotype 88.0 with 83.7", "fairness 100.0"):
            assert score in alarms


@pytest.mark.parametrize("suite", ["standard", "smoke"])
def test_two_records_in_one_folder_are_never_compared(synthetic, record, tmp_path, suite):
    both = tmp_path / "both"
    shutil.copytree(record, both)
    from comptrust.actors.record import Record

    for spec in synthetic.specs()[:3]:
        rows = synthetic.answers(spec, 12)
        row = {**synthetic.cell_row(spec), "suite": suite, "evaluation": "e2"}
        row["key"] = "f" + row["key"][1:]
        Record(both).commit(row, synthetic.measured(rows, spec, intervals=False), rows)
    text = report.build(load_results(both), tmp_path / "r.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    others = {m["name"] for m in data["models"]} - {f"acme/lm-13b-chat ({suite}{' e2' if suite == 'smoke' else ''})"}
    assert len(others) == len(data["models"]) - 1 and any(name.startswith("acme/lm-13b-chat (smoke") for name in others)
    for cell in data["cells"]:
        assert data["cells"][cell["dense"]]["model"] == cell["model"]
