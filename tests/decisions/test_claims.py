"""Claims against figures recomputed from the tables by other code."""

from __future__ import annotations

import csv
import io
import json
from datetime import timedelta
from decimal import Decimal

import numpy as np
import pytest
from comptrust.actors.cell import DIMENSIONS
from comptrust.actors.errors import BadInput
from comptrust.actors.record import Record
from comptrust.sweep.claims import claims, render_claims
from comptrust.sweep.effects import Effects
from comptrust.sweep.importer import SHEET, import_table
from comptrust.sweep.recommend import recommend
from comptrust.sweep.resampling import Resampler
from comptrust.sweep.results import load_results
from decision_records import NOW, answers, published, sheet, write_cell
from rich.console import Console
from scipy import stats


def figures(table):
    """Drops by rate over the 13b cells, straight from the CSV."""
    dense = {r["Base Model"]: r for r in table if r["Method Subtype"] == "none"}
    out = {}
    for r in table:
        if "13b" not in r["Base Model"] or r["Method Subtype"] == "none":
            continue
        pruned = r["Method Subtype"] in ("mag", "wanda", "sparsegpt")
        group = "50% N:M" if pruned else f"{r['Sparsity/bits']}-bit"
        deltas = [float(Decimal(r[c]) - Decimal(dense[r["Base Model"]][c])) for c in SHEET.values()]
        out.setdefault(group, []).append((sum(d < -5 for d in deltas), min(deltas)))
    return out


def test_published_figures(published_sheet):
    found = {g.group: g for g in claims(load_results(published_sheet)).groups if g.size.startswith("13b")}
    with open(published() / "comp_trust_num_sheet.csv") as f:
        own = figures(list(csv.DictReader(f)))
    assert set(found) == set(own)
    for group, cells in own.items():
        g = found[group]
        assert g.cells == len(cells)
        assert g.dims_down_mean == pytest.approx(np.mean([n for n, _ in cells]))
        assert g.worst_delta == pytest.approx(min(w for _, w in cells))
    # and the figures of the field notes
    assert (found["8-bit"].cells, found["8-bit"].cells_without_drop, found["8-bit"].dims_down_max) == (6, 6, 0)
    # (whose 0.75 counts a drop of exactly 5 as more: 61.4 - 66.4 is -5.000000000000007 in binary)
    assert (found["4-bit"].cells, found["4-bit"].dims_down_mean) == (8, 0.625)
    assert found["4-bit"].worst_delta == pytest.approx(-18.4)
    assert (found["3-bit"].cells, found["3-bit"].dims_down_mean) == (10, pytest.approx(3.2))
    assert found["3-bit"].worst_delta == pytest.approx(-51.5)
    assert (found["50% N:M"].cells, round(found["50% N:M"].dims_down_mean, 1)) == (17, 4.1)


def test_published_correlations(published_sheet):
    found = {c["dimension"]: c for c in claims(load_results(published_sheet)).correlations if c["size"].startswith("13b")}
    expected = {"ood": 0.74, "privacy": 0.41, "toxicity": 0.40, "demonstrations": 0.39, "ethics": 0.35, "stereotype": -0.07,
                "fairness": -0.31, "adversarial": -0.40}  # fmt: skip
    assert {d: round(c["r"], 2) for d, c in found.items()} == expected
    assert {c["n"] for c in found.values()} == {41}


def test_published_verdicts_are_never_more_than_points_allow(published_sheet):
    for f in claims(load_results(published_sheet)).findings:
        assert f.basis in ("point", "seeds", "cells")
        if f.basis == "point":
            assert f.verdict == "undecided" and f.leaning in ("holds", "fails")


def test_published_findings(published_sheet):
    found = claims(load_results(published_sheet))
    by = {(f.claim, f.model): f for f in found.findings}
    assert {by["D1", m].leaning for m in ("LLAMA2 13b", "LLAMA2 13b Chat", "Vicuna 13b Chat")} == {"holds"}
    assert "+20.1 toxicity" in by["D1", "Vicuna 13b Chat"].observed
    assert by["D2", "LLAMA2 70b Chat"].leaning == "holds"
    assert {by["D2", m].leaning for m in ("Vicuna 13b Chat", "LLAMA2 7b Chat", "LLAMA2 13b")} == {"fails"}
    assert (by["D3", "Vicuna 13b Chat"].leaning, by["D3", "LLAMA2 7b Chat"].leaning) == ("holds", "fails")
    assert "refusal -20" in by["D3", "LLAMA2 13b Chat"].observed
    assert by["D5", "LLAMA2 13b Chat"].value == 6 / 8  # not fairness, not stereotype
    assert by["D7", "Vicuna 13b Chat"].value == pytest.approx(28.1)
    assert "fairness" in by["D8", "LLAMA2 13b Chat"].observed
    gptq = by["D9", "LLAMA2 13b Chat"].detail["sd"]
    assert gptq["gptq 4-bit"]["ethics"] == pytest.approx(4.4, abs=0.05)
    assert gptq["gptq 3-bit"]["ethics"] == pytest.approx(9.8, abs=0.05)
    assert gptq["sparsegpt 2:4"]["ethics"] == pytest.approx(16.6, abs=0.05)
    assert by["D12", "LLAMA2 13b Chat"].observed.count("MMLU") == 3


def test_beyond_perplexity(published_summary):
    by = {(f.claim, f.model): f for f in claims(load_results(published_summary)).findings}
    assert by["B1", "llama2_13b"].leaning == "fails" and "0.161 -> 0.283 (sparsegpt 60%)" in by["B1", "llama2_13b"].observed
    assert by["B4", "llama2_13b"].verdict == "holds"
    assert "1.44 dense" in by["B5", "llama2_13b"].observed and "1.59 (magnitude 60%" in by["B5", "llama2_13b"].observed


def test_own_table(small_sheet):
    found = claims(load_results(small_sheet))
    by = {(f.claim, f.model): f for f in found.findings}
    groups = {g.group: g for g in found.groups}
    assert (groups["8-bit"].dims_down_mean, groups["3-bit"].dims_down_mean) == (0.0, 2.0)  # 1 and 3 dimensions down
    assert groups["50% N:M"].dims_down_mean == pytest.approx((3 + 3 + 4) / 3)
    assert by["D4", "Base 13b"].leaning == "holds" and by["D6", "Base 13b"].leaning == "holds"
    assert by["D7", "Base 13b"].value == 30.0
    assert by["D12", "Base 13b"].leaning == "holds"
    assert by["D8", "Base 13b"].value == 2 and by["D8", "Base 13b"].leaning == "fails"
    json.dumps(found.to_json(), allow_nan=False)


# -- with items the verdicts are tests -------------------------------------------------------------------------------------


@pytest.fixture
def items_record(tmp_path):
    """800 prompts: 8-bit unchanged but for two flips, 4-bit 12 points down, 3-bit undecided at -5."""
    record = Record(tmp_path)
    dense = [True] * 560 + [False] * 240
    write_cell(record, "dense", {"ethics": answers("ethics", dense)}, mmlu=50.0)
    flips = {8: 2, 4: 96, 3: 40}
    for bits, n in flips.items():
        write_cell(record, "gptq", {"ethics": answers("ethics", [False] * n + dense[n:])}, bits=bits, mmlu=50.0)
    return load_results(tmp_path)


def test_verdicts_from_items(items_record):
    by = {f.claim: f for f in claims(items_record).findings}
    assert (by["D1"].verdict, by["D1"].basis) == ("holds", "items")
    assert by["D2"].verdict == "fails"
    assert by["D1"].observed.endswith("; rests on ethics alone")  # seven dimensions were not measured
    assert (by["D4"].verdict, by["D4"].leaning) == ("undecided", "fails")  # exactly -5 is no drop beyond 5


def test_effects_against_hand_computed(items_record):
    e = Effects(items_record)
    row = next(r for r in e.rows.values() if r["bits"] == 4)
    x = e.of(row["key"])["ethics"]
    assert (x.delta, x.test, x.n) == (pytest.approx(-12.0), "mcnemar", 800)
    assert x.p == pytest.approx(stats.binomtest(96, 96).pvalue)
    assert x.transitions["right_to_wrong"] == 96
    d = np.r_[np.full(96, -100.0), np.zeros(704)]
    assert (x.low, x.high) == pytest.approx(stats.t.interval(0.95, 799, d.mean(), stats.sem(d)), abs=0.25)


def test_clustered_effects_are_not_mcnemar(tmp_path):
    """Ten samples of each of 20 prompts, all samples of a prompt alike: 20 observations, not 200."""
    record = Record(tmp_path)
    dense, cell = [True] * 200, [i // 10 % 5 != 0 for i in range(200)]
    write_cell(record, "dense", {"stereotype": answers("stereotype", dense, samples=10)})
    key = write_cell(record, "rtn", {"stereotype": answers("stereotype", cell, samples=10)}, bits=4)
    x = Effects(load_results(tmp_path)).of(key)["stereotype"]
    assert (x.test, x.n, x.delta) == ("bootstrap", 20, pytest.approx(-20.0))
    assert x.p > 0.01  # 200 independent answers would give 1e-12
    assert x.transitions["unbiased_to_biased"] == 40


def test_counts_of_prompts_do_not_test_a_mean_over_scenarios(tmp_path):
    """60 of 400 lost in one scenario, 6 of 10 won in the other: the score rises by 22.5 points, which the counts do not show."""
    r = Record(tmp_path)

    def asked(task, right):
        more = {"scenario": f"alpaca/{task}", "target": {"task": task, "label": 1}}
        rows = answers("adversarial", right)
        return [{**x, **more, "item": f"{task}/{i}", "cluster": f"{task}{i}"} for i, x in enumerate(rows)]

    write_cell(r, "dense", {"adversarial": asked("sst2", [True] * 400) + asked("mnli", [False] * 10)})
    cell = asked("sst2", [False] * 60 + [True] * 340) + asked("mnli", [True] * 6 + [False] * 4)
    key = write_cell(r, "rtn", {"adversarial": cell}, bits=4)
    effect = Effects(load_results(tmp_path)).of(key)["adversarial"]
    assert effect.delta == pytest.approx(22.5) and effect.test == "bootstrap" and effect.p > 0.001


def test_no_dense_no_claims(tmp_path):
    write_cell(Record(tmp_path), "rtn", {"ethics": answers("ethics", [True] * 4)}, bits=4)
    with pytest.raises(BadInput, match="both a dense and a compressed cell"):
        claims(load_results(tmp_path))


def test_seeds_of_one_configuration_are_found(tmp_path):
    """Digest, key and seed differ between calibration seeds; source, samples and parameters do not."""
    r, common = Record(tmp_path), {"calibration": "builtin", "samples": 4, "bits": 4}
    write_cell(r, "dense", {"ethics": answers("ethics", [True] * 50)})
    keys = [
        write_cell(
            r,
            "gptq",
            {"ethics": answers("ethics", [False] * n + [True] * (50 - n))},
            seed=n,
            calibration_digest=f"d{n}",
            **common,
        )
        for n in range(3)
    ]
    write_cell(r, "gptq", {"ethics": answers("ethics", [True] * 50)}, seed=0, **{**common, "samples": 8})
    e = Effects(load_results(tmp_path))
    assert sorted(e.seeds(keys[0])) == sorted(keys)
    assert e.of(keys[1])["ethics"].seed_sd == pytest.approx(2.0)


def test_seeds_without_a_score_have_no_spread(tmp_path):
    """Calibration seeds that all fell silent: their spread is not a number, and no claim rests on it."""
    r = Record(tmp_path)
    ethics = answers("ethics", [True] * 20)
    silent = [{**x, "outcome": "degenerate", "score": None} for x in ethics]
    write_cell(r, "dense", {"ethics": ethics})
    for bits in (4, 3):
        for seed in (0, 1):
            write_cell(r, "gptq", {"ethics": silent}, bits=bits, seed=seed)
    assert claims(load_results(tmp_path)).of("D9") == []
    for seed, lost in ((0, 0), (1, 4)):
        write_cell(r, "awq", {"ethics": answers("ethics", [i >= lost for i in range(20)])}, bits=3, seed=seed)
    (found,) = claims(load_results(tmp_path)).of("D9")
    assert found.observed == "awq 3-bit mean sd 14.1; no two rates of a method differ in it"


def test_cells_computed_anew_are_no_seeds(tmp_path):
    """After a repair of the method, or with another text under the same name, every seed stands there twice."""
    r, later = Record(tmp_path), NOW + timedelta(days=1)
    write_cell(r, "dense", {"ethics": answers("ethics", [True] * 50)})

    def cell(method, lost, at, **more):
        return write_cell(
            r, method, {"ethics": answers("ethics", [i >= lost for i in range(50)])}, bits=4, finished_at=at, **more
        )

    once = [cell("rtn", 20, NOW), cell("rtn", 0, later)]
    before, after = ([cell("gptq", lost + n, at, seed=n) for n in range(3)] for lost, at in ((20, NOW), (0, later)))
    e = Effects(load_results(tmp_path))
    assert sorted(e.seeds(after[1])) == sorted(after) and not {once[0], *before} & set(e.rows)
    assert e.of(after[0])["ethics"].seed_sd == pytest.approx(2.0) and not e.of(after[0])["ethics"].seed_unstable
    assert e.of(once[1])["ethics"].seed_sd is None
    assert [len(g) for g in Resampler(e.results, [*e.rows, once[0], *before], ["ethics"], seed=0).groups] == [3, 3]
    (spread,) = claims(load_results(tmp_path)).of("D9")
    assert spread.observed == "gptq 4-bit mean sd 2.0; no two rates of a method differ in it"


def test_rounding_is_no_change(tmp_path):
    """Seeds of one score differ neither from each other nor from one alone."""
    common = {"model": "Base 13b", "mmlu": 50.0, **dict.fromkeys(DIMENSIONS, 63.3)}
    rows = [{**common, "method": "dense", "bits": 16, "name": "base"}]
    for bits in (8, 3):
        name = {"method": "gptq", "bits": bits, "name": f"gptq-{bits}bit"}
        rows += [{**common, **name, "name": f"{name['name']}-seed{seed}", "ethics": 59.3 + bits} for seed in range(3)]
    rows += [{**common, "method": "awq", "bits": 3, "name": "awq-3bit", "ethics": 62.3}]
    import_table(sheet(tmp_path / "t.csv", rows), tmp_path / "r", "comp-trust-sheet")
    found = claims(load_results(tmp_path / "r"))
    assert found.of("D5") == []
    assert found.of("D9")[0].observed.endswith("no two rates of a method differ in it")


def test_suites_are_never_mixed(tmp_path):
    record = Record(tmp_path)
    write_cell(record, "dense", {"ethics": answers("ethics", [True] * 20)}, suite="smoke", evaluation="smoke")
    write_cell(record, "rtn", {"ethics": answers("ethics", [False] * 20)}, bits=4)
    with pytest.raises(BadInput):
        claims(load_results(tmp_path))


def test_two_evaluations_of_one_suite_are_counted_apart(tmp_path):
    """The same weights on two data packs: two findings that can be told apart, and no cell counted twice in one group."""
    from comptrust.sweep.report_verdicts import claims_table

    r = Record(tmp_path)
    for evaluation, lost in (("probes", 0), ("pack", 60)):
        common = {"evaluation": evaluation, "suite": "standard"}
        write_cell(r, "dense", {"ethics": answers("ethics", [True] * 200)}, **common)
        write_cell(r, "gptq", {"ethics": answers("ethics", [i >= lost for i in range(200)])}, bits=4, **common)
    found = claims(load_results(tmp_path))
    assert {(f.suite, f.verdict) for f in found.of("D2")} == {("standard pack", "fails"), ("standard probes", "holds")}
    assert [(g.size, g.cells, g.dims_down_max) for g in found.groups] == [
        ("1b standard pack", 1, 1),
        ("1b standard probes", 1, 0),
    ]
    (row,) = (r for r in claims_table(found)["rows"] if r["id"] == "D2")
    assert [f["verdict"] for f in row["findings"]] == ["fails", "holds"]


def test_silence_is_a_loss(tmp_path):
    """Half of the dimensions gained, the other half fell silent: such a cell neither keeps trust nor has a worst drop."""
    r = Record(tmp_path)
    ethics, adversarial = answers("ethics", [True] * 600), answers("adversarial", [i % 2 == 0 for i in range(600)])
    silent = [{**x, "outcome": "degenerate", "score": None} for x in ethics]
    write_cell(r, "dense", {"ethics": ethics, "adversarial": adversarial})
    better = answers("adversarial", [True] * 600)
    for method, rate in (("rtn", {"bits": 8}), ("wanda", {"sparsity": 0.5, "pattern": "2:4"})):
        write_cell(r, method, {"ethics": silent, "adversarial": better}, **rate)
    results = load_results(tmp_path)
    found = claims(results)
    (kept,) = found.of("D1")
    assert (kept.verdict, kept.leaning) == ("undecided", "fails") and "1 score lost to silence" in kept.observed
    assert [(g.group, g.dims_down_mean, g.cells_without_drop) for g in found.groups] == [("8-bit", 1, 0), ("50% N:M", 1, 0)]
    drops = {x["method"]: x["worst_drop"] for x in results.rows("select method, worst_drop from results")}
    assert drops == {"dense": 0, "rtn": None, "wanda": None}


def test_a_cell_of_which_no_score_is_left_is_counted(tmp_path):
    """The worst cells of all must not be missing where drops are counted."""
    r = Record(tmp_path)
    right = answers("ethics", [True] * 200)
    silent = [{**x, "outcome": "degenerate", "score": None} for x in right]
    write_cell(r, "dense", {"ethics": right})
    write_cell(r, "rtn", {"ethics": right}, bits=8)
    lost = [
        write_cell(r, "rtn", {"ethics": silent}, bits=3),
        write_cell(r, "magnitude", {"ethics": silent}, sparsity=0.5, pattern="2:4"),
    ]
    results = load_results(tmp_path)
    found = claims(results)
    groups = {g.group: (g.cells, g.dims_down_mean, g.worst_delta) for g in found.groups}
    assert groups == {"8-bit": (1, 0, 0.0), "3-bit": (1, 1, None), "50% N:M": (1, 1, None)}
    (hidden,) = found.of("D4")
    assert hidden.verdict == "undecided" and "no score left" in hidden.observed
    assert "50% pruned 1.0" in found.of("D6")[0].observed
    rules = {x.id: x.supports for x in recommend(results).rules}
    assert rules["evaluate"] == sorted(lost) and rules["quantise"] == lost[1:]
    render_claims(found, Console(file=io.StringIO()))
    json.dumps(found.to_json(), allow_nan=False)
