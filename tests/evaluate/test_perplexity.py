from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from comptrust.actors.errors import BadInput, CellError
from comptrust.actors.evaluate.config import PerplexityConfig
from comptrust.actors.evaluate.perplexity import load_windows, score_windows


def config(source="builtin", **more) -> PerplexityConfig:
    return PerplexityConfig(source=str(source), **{"windows": 3, "seqlen": 40, **more})


def test_equals_the_loss_of_transformers_in_float64(tiny_model, tokenizer):
    windows_WL = load_windows(config(), tokenizer)
    exact = copy.deepcopy(tiny_model).double()
    with torch.no_grad():
        losses = [float(exact(input_ids=w[None], labels=w[None]).loss) for w in windows_WL]
    scores = score_windows(tiny_model, windows_WL)
    assert scores.tokens == 3 * 39
    assert scores.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_windows_are_consecutive_tokens_of_the_text(tokenizer):
    from importlib.resources import files

    text = (files("comptrust.actors.data") / "perplexity.txt").read_text()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert load_windows(config(), tokenizer).flatten().tolist() == ids[:120]


def test_packaged_text_is_no_calibration_text():
    from importlib.resources import files

    def grams(name: str) -> set[tuple[str, ...]]:
        words = (files("comptrust.actors.data") / name).read_text().lower().split()
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    assert grams("perplexity.txt") and not grams("perplexity.txt") & grams("calibration.txt")


def test_sources(tmp_path, tokenizer):
    ids = np.arange(5 * 50, dtype=np.int64).reshape(5, 50) % len(tokenizer)
    np.save(tmp_path / "ids.npy", ids)
    assert torch.equal(load_windows(config(tmp_path / "ids.npy"), tokenizer), torch.from_numpy(ids[:3, :40]))
    lines = ["The first text. " * 40, "The second. " * 40]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    (tmp_path / "t.txt").write_text("\n\n".join(lines))
    assert torch.equal(
        load_windows(config(tmp_path / "t.jsonl"), tokenizer), load_windows(config(tmp_path / "t.txt"), tokenizer)
    )


def test_bad_sources(tmp_path, tokenizer):
    np.save(tmp_path / "one.npy", np.arange(50))
    np.save(tmp_path / "large.npy", np.full((5, 50), len(tokenizer)))
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n\n{"txt": "x"}\n')
    np.savez(tmp_path / "archive.npz", np.ones((5, 50), dtype=np.int64))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "half.jsonl").write_text('{"text": "cut \\ud83d"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    for source, message in [
        ("one.npy", r"int64 \[50\], not int64 \[windows, seqlen\]"),
        ("large.npy", "the tokenizer has"),
        ("objects.npy", "cannot read"),
        ("short.txt", r"has 0 windows of 40 tokens, 3 are asked for"),
        ("archive.npy", "cannot read"),
        ("bad.jsonl", r"bad\.jsonl', line 3: KeyError"),
        ("half.jsonl", "UnicodeEncodeError"),
        ("latin.txt", "UnicodeDecodeError"),
        ("absent.txt", "No such file"),
        ("weights.pt", "unknown kind of text"),
    ]:
        with pytest.raises(BadInput, match=message) as e:
            load_windows(config(tmp_path / source), tokenizer)
        assert "evaluation.perplexity" in str(e.value)
    np.save(tmp_path / "narrow.npy", np.zeros((5, 20), dtype=np.int64))
    with pytest.raises(BadInput, match="rows of 20 tokens, seqlen is 40"):
        load_windows(config(tmp_path / "narrow.npy"), tokenizer)


def test_broken_weights_are_an_error(tiny_model, tokenizer):
    broken = copy.deepcopy(tiny_model)
    broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CellError, match="NaN"):
        score_windows(broken, load_windows(config(), tokenizer))
