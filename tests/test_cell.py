"""Golden digests: a change here makes every stored result unfindable, so it must be meant."""

from __future__ import annotations

import pytest
from comptrust.actors.cell import REVISIONS, Cell, canonical, digest
from pydantic import ValidationError

GPTQ = Cell(
    model="org/name@main", revision="0123abcd", method="gptq", params={"bits": 4, "group_size": 64, "damping": 0.05},
    dtype="bfloat16", template="t0", calibration={"source": "builtin", "samples": 4}, calibration_digest="c0", evaluation="e0",
)  # fmt: skip


def test_canonical_is_one_text():
    assert canonical({"b": 1, "a": [0.1, None, True, "ä"]}) == '{"a":[0.1,null,true,"\\u00e4"],"b":1}'
    with pytest.raises(ValueError):
        canonical({"x": float("nan")})


def test_golden_digests():
    # echo -n '{"a":1}' | sha256sum
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590"
    assert GPTQ.artifact_key == "a377616683123fefb027939c"
    assert GPTQ.key == "c10d95de740c93899eb30c48"


@pytest.mark.parametrize(
    "change",
    [{"revision": "x"}, {"method": "rtn"}, {"params": {"bits": 3}}, {"backend": "gptqmodel"}, {"dtype": "float32"}, {"template": ""},
     {"calibration_digest": "c1"}],
)  # fmt: skip
def test_weights_are_named_by_all_that_changes_them(change):
    assert GPTQ.key  # a copy must not carry the digests of the cell it came from
    other = GPTQ.model_copy(update=change)
    assert other.artifact_key != GPTQ.artifact_key
    assert other.key != GPTQ.key


def test_a_repaired_method_names_new_weights(monkeypatch):
    theirs = GPTQ.model_copy(update={"backend": "gptqmodel"})
    keys = [c.key for c in (GPTQ, theirs)]
    monkeypatch.setitem(REVISIONS, "gptq", REVISIONS["gptq"] + 1)
    assert GPTQ.key != keys[0]
    assert theirs.key == keys[1]  # the repair was of our code


def test_evaluation_changes_the_key_and_keeps_the_artefact():
    other = Cell(**{**GPTQ.model_dump(), "evaluation": "e1"})
    assert other.artifact_key == GPTQ.artifact_key and other.key != GPTQ.key


def test_names_and_texts_for_people_change_nothing():
    other = Cell(**{**GPTQ.model_dump(), "model": "other/spelling", "suite": "full", "calibration": {"source": "elsewhere"}})
    assert (other.artifact_key, other.key) == (GPTQ.artifact_key, GPTQ.key)


def test_order_of_parameters_changes_nothing():
    other = Cell(**{**GPTQ.model_dump(), "params": {"damping": 0.05, "group_size": 64, "bits": 4}})
    assert other.key == GPTQ.key


def test_cell_is_frozen_and_closed():
    with pytest.raises(ValidationError):
        GPTQ.method = "rtn"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Cell(model="m", revision="r", method="rtn", bits=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("method", "params", "label"),
    [("dense", {}, "dense"),
        ("gptq", {"bits": 4, "group_size": 64}, "gptq 4 g64"), ("wanda", {"sparsity": 0.5, "pattern": "2:4"}, "wanda 2:4"),

     ("magnitude", {"sparsity": 0.5, "pattern": "unstructured"}, "magnitude 50%")],
)  # fmt: skip
def test_label(method, params, label):
    assert Cell(model="m", revision="r", method=method, params=params).label == label
