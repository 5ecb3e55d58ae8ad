from __future__ import annotations

import copy

import pytest
import torch
from comptrust.actors.errors import CellError
from comptrust.actors.evaluate.config import PerplexityConfig
from comptrust.actors.evaluate.divergence import (
    Divergence,
    Reference,
    dense_rows,
    divergence_rows,
    encode_outcomes,
    flip_rows,
)
from comptrust.actors.evaluate.perplexity import load_windows, score_windows
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr


@pytest.fixture(scope="module")
def windows_WL(tokenizer):
    return load_windows(PerplexityConfig(windows=3, seqlen=200), tokenizer)


@pytest.mark.parametrize("positions", [2048, 150])
def test_against_float64(tiny_model, other_model, windows_WL, positions):
    dense = score_windows(tiny_model, windows_WL, positions=positions)
    assert dense.reference["logprob"].dtype == torch.float16
    scores = score_windows(other_model, windows_WL, reference=dense.reference, positions=positions)

    def logits(model):
        with torch.no_grad():
            return torch.cat([copy.deepcopy(model).double()(input_ids=w[None]).logits[0, :-1] for w in windows_WL])[:positions]

    p, q = (logits(m).softmax(-1).numpy() for m in (tiny_model, other_model))
    rows = {r.metric: r for r in divergence_rows(scores.divergence)}
    kl = rel_entr(p, q).sum(-1).mean()
    assert 0.01 < kl < 10  # a difference worth measuring
    assert rows["kl_dense"].value == pytest.approx(kl, rel=1e-3)
    assert rows["kl_dense"].n == min(positions, 3 * 199)
    assert rows["top1_agreement"].value == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=2 / len(p))
    assert scores.nll == pytest.approx(score_windows(other_model, windows_WL).nll)  # a reference does not change the perplexity


def test_a_model_does_not_diverge_from_itself(tiny_model, windows_WL):
    """What is left is the rounding of the stored log-probabilities, and it is of second order."""
    scores = score_windows(tiny_model, windows_WL, reference=score_windows(tiny_model, windows_WL).reference)
    rows = {r.metric: r.value for r in divergence_rows(scores.divergence)}
    assert 0 <= rows["kl_dense"] < 1e-6 and rows["top1_agreement"] == 1.0


def test_a_reference_of_other_text_is_refused(tiny_model, tokenizer, windows_WL):
    other = score_windows(tiny_model, windows_WL.flip(0)).reference
    with pytest.raises(CellError, match="other windows"):
        score_windows(tiny_model, windows_WL, reference=other)


def row(outcome: str, dimension: str = "ethics") -> dict:
    return {"outcome": outcome, "dimension": dimension}


def test_flips_by_hand():
    dense = [
        row("correct"),
        row("correct"),
        row("wrong"),
        row("refused"),
        row("wrong"),
        row("scored", "toxicity"),
        row("correct", "ood"),
    ]
    cell = [
        row("correct"),
        row("wrong"),
        row("correct"),
        row("empty"),
        row("wrong"),
        row("empty", "toxicity"),
        row("correct", "ood"),
    ]
    rows = {r.scenario: r for r in flip_rows(cell, encode_outcomes(dense))}
    assert set(rows) == {"", "ethics", "ood"}
    assert (rows["ethics"].value, rows["ethics"].n) == (2 / 5, 5)
    assert (rows["ood"].value, rows["ood"].n) == (0, 1)
    assert (rows[""].value, rows[""].n) == (2 / 6, 6)
    with pytest.raises(CellError, match="7 answers, this cell 6"):
        flip_rows(cell[1:], encode_outcomes(dense))
    for graded in ("toxicity", "stereotype", "privacy"):  # also where nothing was graded, in neither cell
        assert flip_rows([row("scored", graded)], encode_outcomes([row("empty", graded)])) == []
        assert flip_rows([row("refused", graded)], encode_outcomes([row("refused", graded)])) == []
    assert [r.value for r in flip_rows([row("empty")], encode_outcomes([row("refused")]))] == [
        0,
        0,
    ]  # has a key, nobody found it


outcomes = st.lists(
    st.sampled_from(["correct", "wrong", "refused", "unparseable", "empty", "degenerate", "scored"]), min_size=1
)


@given(outcomes, st.randoms(use_true_random=False))
def test_flips_are_symmetric_and_vanish_for_equals(dense, random):
    a, b = [row(o) for o in dense], [row(o) for o in random.sample(dense, len(dense))]
    assert flip_rows(a, encode_outcomes(b)) == flip_rows(b, encode_outcomes(a))
    assert all(r.value == 0 for r in flip_rows(a, encode_outcomes(a)))


def test_dense_cell():
    assert {r.metric: r.value for r in dense_rows()} == {"kl_dense": 0.0, "top1_agreement": 1.0, "flips": 0.0}


def test_tokens_that_a_model_masks_take_no_part():
    """Both models give them no probability; the NaN of 0 x inf was stored as a divergence of 0."""
    logits_KV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits_KV[:, 40:] = -torch.inf
    dense, other = logits_KV.log_softmax(-1), (2 * logits_KV).log_softmax(-1)
    reference = Reference.empty(3, 50)
    reference.put(0, dense)
    found = Divergence()
    found.add(reference, 0, other)
    p, q = dense[:, :40].double(), other[:, :40].double()
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
