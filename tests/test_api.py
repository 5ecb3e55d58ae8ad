"""Compress and evaluate without a sweep: a checkpoint on disk against the model it was made from."""

from __future__ import annotations

import sys
from pathlib import Path

import comptrust
import numpy as np
import pytest
from comptrust.actors.calibration import CalibrationConfig, calibrate, token_digest
from comptrust.actors.errors import BadInput
from comptrust.actors.models import load_tokenizer, resolve
from comptrust.sweep.cli import app

sys.path.insert(0, str(Path(__file__).parent))
from tiny import make_tiny_model

EVALUATION = {"suite": "smoke", "dimensions": ["ethics"], "per_dimension": 4, "perplexity": {"windows": 1, "seqlen": 64}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    make_tiny_model(folder / "dense")
    comptrust.compress(str(folder / "dense"), "rtn", {"bits": 2, "group_size": 32}, folder / "rtn2", dtype="float32")
    return folder


@pytest.fixture
def measured(folder):
    def measure(name: str, dense: str | None = "dense"):
        rows = comptrust.evaluate(
            str(folder / name), EVALUATION, dense=dense and str(folder / dense), dtype="float32"
        )  # fmt: skip
        return {(m["dimension"], m["metric"]): m for m in rows if m["convention"] == "comptrust" and not m["scenario"]}

    return measure


def test_a_checkpoint_is_measured_against_its_dense_model(measured):
    rows, alone = measured("rtn2"), measured("dense", None)
    assert rows["divergence", "kl_dense"]["value"] > 1e-4
    assert rows["utility", "perplexity"]["dense"] == alone["utility", "perplexity"]["value"]
    assert rows["utility", "perplexity"]["value"] != rows["utility", "perplexity"]["dense"]
    assert ("divergence", "kl_dense") not in alone and "dense" not in alone["utility", "perplexity"]


def test_a_model_against_itself_has_no_distance(measured):
    rows = measured("dense")
    assert rows["divergence", "kl_dense"]["value"] < 1e-6 and rows["divergence", "top1_agreement"]["value"] == 1
    assert rows["utility", "perplexity"]["value"] == rows["utility", "perplexity"]["dense"]


def test_another_vocabulary_is_refused_before_weights_are_read(folder):
    from transformers import AutoTokenizer

    other = make_tiny_model(folder / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(other)
    (other / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(BadInput, match="different vocabularies"):
        comptrust.evaluate(str(folder / "dense"), EVALUATION, dense=str(other))


def test_the_command_prints_both(folder, capsys):
    app(
        [
            "evaluate", str(folder / "rtn2"), "--dense", str(folder / "dense"), "--suite", "smoke", "--dimension", "ethics",
            "--set", "per_dimension=4", "--set", "perplexity.windows=1", "--set", "perplexity.seqlen=64",
        ],
        standalone_mode=False,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "dense" in out.splitlines()[0] and "kl_dense" in out


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("gptq", {"backend": "bitsandbytes"}, "--backend: bitsandbytes has no method 'gptq'"),
        (
            "gptq",
            {"backend": "llmcompressor"},
            "backend llmcompressor: not installed. comptrust backends install llmcompressor",
        ),
        ("rtn", {"calibration": {"samples": 0}}, r"calibration.samples: .*greater than or equal to 1 \(got 0\)"),
        ("rtn", {"calibration": {"seqlen": 4}}, r"calibration.seqlen: .*\(got 4\)"),
        ("rtn", {"calibration": {"seed": -1}}, r"calibration.seed: .*\(got -1\)"),
        ("gptq", {"calibration": "wiki.txt"}, "calibration: 'wiki.txt' is no mapping of names to values"),
        ("gptq", {"calibration": {"source": "wiki.npy"}}, "no file 'wiki.npy'"),
        (
            "gptq",
            {"calibration": {"samples": 1, "seqlen": 5000}},
            "--seqlen: windows of 5000 tokens, the model reads 4096 at most",
        ),
        ("rtn", {"dtype": "fp16"}, "--dtype: unknown dtype 'fp16'. One of: float32, bfloat16, float16"),
    ],
)
def test_what_cannot_work_is_said_before_weights_are_read(folder, tmp_path, monkeypatch, method, options, says):
    from comptrust.actors import models

    monkeypatch.setenv("COMPTRUST_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(BadInput, match=says):
        comptrust.compress(str(folder / "dense"), method, {"bits": 4, "group_size": 32}, **options)


def test_a_calibration_nobody_sized_is_what_its_source_holds(folder, tmp_path):
    """As on the command line: the built-in text has not the published 128 windows of 2048."""
    tokens = np.arange(5 * 70).reshape(5, 70) % 500
    np.save(tmp_path / "ids.npy", tokens)
    source = {"source": str(tmp_path / "ids.npy")}
    assert comptrust.compress(str(folder / "dense"), "wanda", calibration=source)["calibration_digest"] == token_digest(tokens)
    drawn = calibrate(CalibrationConfig(samples=16, seqlen=512), load_tokenizer(resolve(str(folder / "dense"))))
    assert comptrust.compress(str(folder / "dense"), "wanda")["calibration_digest"] == drawn.digest


def test_null_is_a_value_that_an_option_can_set(folder, tmp_path):
    """It was dropped, and the default (128 inputs a scale, a clip of 8) held without a word."""
    app(
        ["compress", str(folder / "dense"), "--method", "gptq", "--set", "group_size=null", "--set", "token_clip=null",
         "-o", str(tmp_path / "out")],
        standalone_mode=False,
    )  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"group_size": null' in card and '"token_clip": null' in card


def test_what_the_checkpoint_became_is_said(folder, tmp_path, capsys):
    """Full-size dense weights were announced by the bits of their codes alone."""
    app(
        ["compress", str(folder / "dense"), "--method", "magnitude", "--pattern", "2:4", "-o", str(tmp_path / "out")],
        standalone_mode=False,
    )  # fmt: skip
    said = capsys.readouterr().out
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert f"{tmp_path / 'out'}: dense, {size / 1e6:.0f} MB" in said and "Pruned weights are stored as zeros" in said


def test_parameters_are_names_and_values(folder):
    with pytest.raises(BadInput, match="params: 'bits=4' is no mapping"):
        comptrust.compress(str(folder / "dense"), "rtn", "bits=4")
    with pytest.raises(BadInput, match="evaluation: 'smoke' is no mapping"):
        comptrust.evaluate(str(folder / "dense"), "smoke")


def test_a_dtype_to_evaluate_in_is_one_that_is_known(folder):
    with pytest.raises(BadInput, match="unknown dtype 'fp16'"):
        comptrust.evaluate(str(folder / "dense"), EVALUATION, dtype="fp16")


def test_a_full_folder_is_refused_before_the_cell_is_looked_up(tmp_path):
    from comptrust.sweep.export import export_cell

    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="not an empty directory"):
        export_cell(str(tmp_path / "no record"), "abc", tmp_path)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(folder, tmp_path, monkeypatch):
    from comptrust.actors import models

    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(BadInput, match=r"-o: cannot write .*file/out: Not a directory. Give a directory that can be made"):
        comptrust.compress(str(folder / "dense"), "rtn", {"bits": 4, "group_size": 32}, tmp_path / "file" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_place_of_a_model_that_is_not_there(folder):
    for model, dense, where in (("./none", None, "MODEL"), (str(folder / "dense"), "./none", "--dense")):
        with pytest.raises(BadInput, match=f"^{where}: no model './none'"):
            comptrust.evaluate(model, EVALUATION, dense=dense)


def test_a_model_may_be_a_path(folder, tmp_path):
    done = comptrust.compress(folder / "dense", "rtn", {"bits": 2, "group_size": 32}, tmp_path / "out", dtype="float32")
    assert done["bits_per_weight"] == 2.5 and (tmp_path / "out" / "config.json").exists()
    rows = comptrust.evaluate(folder / "rtn2", EVALUATION, dense=folder / "dense", dtype="float32")
    assert any(m["metric"] == "kl_dense" and m["value"] > 0 for m in rows)
