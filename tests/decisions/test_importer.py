"""Published tables as cells: what is parsed, what stays apart, what is refused."""

from __future__ import annotations

import csv
import json

import pytest
from comptrust.actors.cell import DIMENSIONS
from comptrust.actors.errors import BadInput
from comptrust.sweep.importer import SHEET, import_table, parameters_of
from comptrust.sweep.results import load_results
from decision_records import published, sheet


def rows(uri, query="select * from results"):
    return load_results(uri).rows(query)


def test_sheet_maps_every_dimension():
    assert set(SHEET) == set(DIMENSIONS)


def test_published_sheet(published_sheet):
    found = rows(published_sheet)
    assert len(found) == 50 and {r["status"] for r in found} == {"published"}
    with open(published() / "comp_trust_num_sheet.csv") as f:
        table = {r["Model"]: r for r in csv.DictReader(f)}
    for r in found:
        source = table[json.loads(r["params"])["name"]]
        assert r["bits"] == int(source["Sparsity/bits"])  # as published: pruned rows carry a nominal 8
        for d, column in SHEET.items():
            assert r[d] == float(source[column])
            ref = float(source[f"{column} Ref"])
            assert r[f"{d}_refusal"] == pytest.approx(ref if d in ("toxicity", "fairness") else ref / 100)
            assert 0 <= r[f"{d}_refusal"] <= 1
        assert r["trust"] == pytest.approx(sum(float(source[c]) for c in SHEET.values()) / 8)
    patterns = [r["pattern"] for r in found if r["pattern"]]
    assert {p: patterns.count(p) for p in set(patterns)} == {"1:2": 3, "2:4": 11, "4:8": 3}
    seeds = {(r["method"], r["bits"], r["pattern"]): r["seed"] for r in found if r["seed"] is not None}
    assert set(seeds) == {("awq", 3, None), ("gptq", 3, None), ("gptq", 4, None), ("sparsegpt", 8, "2:4")}
    assert sum(r["seed"] is not None for r in found) == 14
    worst = {
        r["model"]: r["worst_drop"]
        for r in found
        if r["method"] == "gptq" and r["bits"] == 4 and r["model"] == "Vicuna 13b Chat"
    }
    assert worst["Vicuna 13b Chat"] == pytest.approx(18.4)


def test_published_summary(published_summary):
    found = rows(published_summary)
    assert len(found) == 144
    assert {r["method"] for r in found} == {"dense", "gptq", "awq", "llm_int8", "magnitude", "wanda", "sparsegpt", "gblm"}
    one = next(r for r in found if (r["model"], r["method"], r["pattern"]) == ("llama2_7b", "wanda", "2:4"))
    assert (one["sparsity"], one["perplexity"]) == (0.5, pytest.approx(12.12, abs=0.01))
    assert all((r["pattern"] is None) == (r["method"] in ("dense", "gptq", "awq", "llm_int8")) for r in found)


def test_importing_twice_changes_nothing(tmp_path):
    table = sheet(tmp_path / "t.csv", [{"model": "A 7b", "method": "none", "bits": 16, "name": "hf/a", "mmlu": 50}])
    assert import_table(table, tmp_path / "r", "comp-trust-sheet") == 1
    before = rows(tmp_path / "r")
    import_table(table, tmp_path / "r", "comp-trust-sheet")
    after = rows(tmp_path / "r")
    assert [r["key"] for r in after] == [r["key"] for r in before]


def test_equal_rows_stay_two_cells(tmp_path):
    row = {"model": "A 7b", "method": "none", "bits": 16, "name": "hf/a", "mmlu": 50}
    assert import_table(sheet(tmp_path / "t.csv", [row, row]), tmp_path / "r", "comp-trust-sheet") == 2
    assert len(rows(tmp_path / "r")) == 2


def test_leaderboard_without_method_columns(tmp_path):
    """Less columns than the sheet: method, bits, group, pattern and seed come from the name."""
    (tmp_path / "t.csv").write_text(
        "Model,Average,Toxicity,Fairness\nacme/x-7b-gptq@4bit_64g_seed2,50,40,60\nacme/x-7b-wanda-semistruct@0.5_4to8,50,40,\n"
    )
    import_table(tmp_path / "t.csv", tmp_path / "r", "comp-trust-sheet")
    gptq, wanda = sorted(rows(tmp_path / "r"), key=lambda r: r["method"])
    assert (gptq["method"], gptq["bits"], gptq["group_size"], gptq["seed"], gptq["model"]) == ("gptq", 4, 64, 2, "acme/x-7b")
    assert (wanda["pattern"], wanda["sparsity"], wanda["fairness"], wanda["fairness_valid"]) == ("4:8", 0.5, None, False)
    assert gptq["trust"] is None and gptq["parameters"] == 7_000_000_000


def test_the_column_of_bits_may_hold_the_sparsity(tmp_path):
    (tmp_path / "t.csv").write_text("Model,Sparsity/bits,Toxicity\nx-7b-wanda,0.6,50\nx-7b-magnitude@0.5_2to4,8,50\n")
    import_table(tmp_path / "t.csv", tmp_path / "r", "comp-trust-sheet")
    found = {r["method"]: (r["bits"], r["sparsity"], r["pattern"]) for r in rows(tmp_path / "r")}
    assert found == {"wanda": (None, 0.6, None), "magnitude": (8, 0.5, "2:4")}


def test_parameters_of():
    assert parameters_of("Llama-2-13b-chat-hf") == 13_000_000_000
    assert parameters_of("SmolLM2-135M") == 135_000_000
    assert parameters_of("Qwen2.5-0.5B-Instruct") == 500_000_000
    assert parameters_of("gpt2") is None and parameters_of("awq-4bit") is None


@pytest.mark.parametrize(
    ("text", "format", "says"),
    [
        ("Model,Toxicity\nx,abc\n", "comp-trust-sheet", "Toxicity is 'abc', not a number"),
        ("Model,Toxicity\nx,inf\n", "comp-trust-sheet", "Toxicity is 'inf'"),
        ("Model,Toxicity,Toxicity Ref\nx,50,7\n", "comp-trust-sheet", "expected a fraction"),
        ("Model,Ethics,Ethics Ref\nx,50,170\n", "comp-trust-sheet", "expected percent"),
        ("Model,Toxicity\nx,1350\n", "comp-trust-sheet", "Toxicity is 1350, expected 0 to 100"),
        ("Model,MMLU,Toxicity\nx,-3,50\n", "comp-trust-sheet", "MMLU is -3, expected 0 to 100"),
        ("Model,Sparsity/bits,Toxicity\nx-gptq,3.5,50\n", "comp-trust-sheet", "Sparsity/bits is 3.5"),
        ("Model,Sparsity/bits,Toxicity\nx-wanda,-1,50\n", "comp-trust-sheet", "Sparsity/bits is -1"),
        ("Model,Sparsity/bits,Toxicity\nx-gptq,1e30,50\n", "comp-trust-sheet", "Sparsity/bits is 1e"),
        ('Model,Toxicity\nx,"50\n' + "y,50\n" * 40_000, "comp-trust-sheet", "no CSV: field larger"),
        ("Model,Toxicity\n,50\n", "comp-trust-sheet", "Model is empty"),
        ("Name,Toxicity\nx,50\n", "comp-trust-sheet", "no column Model"),
        ("Model,Score\nx,50\n", "comp-trust-sheet", "no column one of"),
        ("Model,Toxicity\nx,50,60\n", "comp-trust-sheet", "more columns than the header"),
        ("Model,Toxicity\n", "comp-trust-sheet", "no rows"),
        ("Model,Toxicity\nx,50\n", "beyond-perplexity", "The other format is comp-trust-sheet"),
        (
            "base_model,compression_method,compression_ratio,pruning_structure\nm,distil,0,x\n",
            "beyond-perplexity",
            "unknown method 'distil'",
        ),
        ("Model,Toxicity\nx,50\n", "csv", "unknown format"),
    ],
)
def test_bad_tables(tmp_path, text, format, says):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(BadInput, match=says):
        import_table(tmp_path / "t.csv", tmp_path / "r", format)


def test_missing_file(tmp_path):
    with pytest.raises(BadInput, match="cannot read"):
        import_table(tmp_path / "none.csv", tmp_path / "r", "comp-trust-sheet")


def test_a_bad_row_or_place_imports_nothing(tmp_path):
    (tmp_path / "t.csv").write_text("Model,Toxicity\nx,50\ny,abc\n")
    with pytest.raises(BadInput, match=r"t\.csv:3: Toxicity is 'abc'"):
        import_table(tmp_path / "t.csv", tmp_path / "r", "comp-trust-sheet")
    assert not (tmp_path / "r").exists()
    (tmp_path / "t.csv").write_text("Model,Toxicity\nx,50\n")
    with pytest.raises(BadInput, match=r"^results: cannot write to .*t\.csv"):
        import_table(tmp_path / "t.csv", tmp_path / "t.csv", "comp-trust-sheet")
