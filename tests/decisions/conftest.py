from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

# pytest's importlib mode does not put this folder on sys.path; the tests share `records`.
_spec = importlib.util.spec_from_file_location("decision_records", Path(__file__).with_name("records.py"))
records = importlib.util.module_from_spec(_spec)
sys.modules["decision_records"] = records
_spec.loader.exec_module(records)


def pytest_collection_modifyitems(config, items):
    """Without the published tables (COMPTRUST_PUBLISHED) their tests are not offered; own tables hold the same code."""
    if records.published() is None:
        theirs = [i for i in items if {"published_sheet", "published_summary"} & set(getattr(i, "fixturenames", ()))]
        config.hook.pytest_deselected(items=theirs)
        items[:] = [i for i in items if i not in theirs]


@pytest.fixture(scope="session")
def published_sheet(tmp_path_factory):
    """Results folder with the imported sheet of Decoding Compressed Trust."""
    from comptrust.sweep.importer import import_table

    folder = records.published()
    uri = tmp_path_factory.mktemp("sheet") / "results"
    import_table(folder / "comp_trust_num_sheet.csv", uri, "comp-trust-sheet")
    return uri


@pytest.fixture(scope="session")
def published_summary(tmp_path_factory):
    """Results folder with the imported summary of Beyond Perplexity."""
    from comptrust.sweep.importer import import_table

    folder = records.published()
    uri = tmp_path_factory.mktemp("summary") / "results"
    import_table(folder / "beyond_perplexity_summary.csv", uri, "beyond-perplexity")
    return uri


@pytest.fixture(scope="session")
def small_sheet(tmp_path_factory):
    """Results folder with an own table that has one of everything the claims and alarms look for."""
    from comptrust.sweep.importer import import_table

    folder = tmp_path_factory.mktemp("small")
    import_table(records.sheet(folder / "table.csv", OWN), folder / "results", "comp-trust-sheet")
    return folder / "results"


def _row(method: str, bits: int, name: str, mmlu: float, model: str = "Base 13b", **values) -> dict:
    return {"model": model, "method": method, "bits": bits, "name": name, "mmlu": mmlu, **values}


OWN = [
    _row("none", 16, "hf/acme/base-13b", 60.0),
    _row("AWQ", 8, "base-13b-awq@8bit_128g", 60.1, ethics=58.0),
    _row("GPTQ", 8, "base-13b-gptq@8bit_128g", 59.9, toxicity=85.0),
    _row("GPTQ", 4, "base-13b-gptq@4bit_128g_seed0", 59.0, toxicity=84.0, ethics=70.0, ethics_refusal=0.3),
    _row("GPTQ", 4, "base-13b-gptq@4bit_128g_seed1", 59.0, toxicity=86.0, ethics=66.0),
    _row("GPTQ", 4, "base-13b-gptq@4bit_128g_seed2", 59.0, toxicity=85.0, ethics=68.0),
    _row("AWQ", 3, "base-13b-awq@3bit_128g", 57.0, privacy=50.0),
    _row("GPTQ", 3, "base-13b-gptq@3bit_128g", 55.0, toxicity=83.0, privacy=40.0, ood=30.0, ethics=45.0),
    _row("wanda", 8, "base-13b-wanda-semistruct@0.5_4to8", 50.0, ood=50.0, ethics=50.0, privacy=50.0),
    _row("wanda", 8, "base-13b-wanda-semistruct@0.5_2to4", 45.0, ood=45.0, ethics=45.0, privacy=45.0, fairness=70.0),
    _row(
        "wanda",
        8,
        "base-13b-wanda-semistruct@0.5_1to2",
        35.0,
        ood=40.0,
        ethics=40.0,
        privacy=40.0,
        stereotype=40.0,
        fairness=90.0,
    ),
    _row(
        "none",
        16,
        "hf/acme/base-7b",
        50.0,
        model="Base 7b",
        fairness=100.0,
        fairness_refusal=0.5,
        stereotype=88.0,
        stereotype_refusal=0.8,
    ),
]
