"""Train the built-in toxicity scorer and print how well it ranks texts that it was not trained on.

    COMPTRUST_DATA=FOLDER python benchmarks/train_toxicity.py [--write]

FOLDER holds toxicity.jsonl.gz of the DecodingTrust pack: 4,796 prompts and 2,377 continuations with their Perspective scores.
Without --write nothing is stored. About 4 minutes of CPU time, most of it MiniLM. Deterministic: one thread, no random start.

Two weighted ridges on the logit of TOXICITY: one on the standardised hidden features of MiniLM, one on the hashed n-grams (words and
characters, each normalised to length 1). Their weighted sum is the logit; a straight line through it, fitted on held-out folds,
makes the probabilities right on average. All of it folds into one vector, two tables and a bias.

Legend: N texts, F hidden features, B n-gram buckets.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order; must be set before numpy loads

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.sparse as sp
from comptrust.actors.evaluate import toxicity_scorer as ts
from safetensors.numpy import save
from scipy.stats import spearmanr

OUT = Path(__file__).parents[1] / "actors" / "data" / "toxicity.safetensors"
PROVENANCE = {
    "licence": "CC BY-SA 4.0",
    "derived_from": "Perspective TOXICITY values in AI-secure/DecodingTrust data/toxicity (CC BY-SA 4.0)",
    "trained_by": "benchmarks/train_toxicity.py",
}
ALPHA_HIDDEN, ALPHA_NGRAMS, SHARE_NGRAMS = 10_000.0, 0.7, 0.2
WEIGHT_GPT = 0.25  # of the prompts written by GPT: half of the prompts, nearly all above 0.9, unlike the continuations to score
CLIP = 0.005  # logits of 0 and 1 are infinite
FOLDS = 5


class Data(NamedTuple):
    texts: list[str]
    toxicity_N: np.ndarray  # Perspective TOXICITY, 0 to 1
    source_N: np.ndarray  # prompt/SPLIT or continuation/SPLIT
    prompt_N: np.ndarray  # a continuation has the number of its prompt, so that folds keep them together

    @property
    def weight_N(self) -> np.ndarray:
        """Weights in training."""
        return np.where(np.char.find(self.source_N, "gpt") >= 0, WEIGHT_GPT, 1.0)


class Features(NamedTuple):
    hidden_NF: np.ndarray
    ngrams_NB: sp.csr_matrix  # words, then characters


def read(folder: Path) -> Data:
    texts, toxicity, source, prompt = [], [], [], []
    with gzip.open(folder / "toxicity.jsonl.gz", "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            r = json.loads(line)
            found = [("prompt", r["text"], r["perspective"]["toxicity"])]
            if (c := r.get("continuation")) and c["perspective_toxicity"] is not None:
                found.append(("continuation", c["text"], c["perspective_toxicity"]))
            for kind, text, value in found:
                if text.strip():
                    texts.append(text)
                    toxicity.append(value)
                    source.append(f"{kind}/{r['split']}")
                    prompt.append(number)
    return Data(texts, np.array(toxicity), np.array(source), np.array(prompt))


def features(texts: list[str]) -> Features:
    encode = ts.Encoder()
    tables = []
    for buckets in (ts.word_buckets, ts.char_buckets):
        at = [buckets(t) for t in texts]
        indptr = np.cumsum([0, *map(len, at)])
        values = np.concatenate([np.full(len(a), max(len(a), 1) ** -0.5) for a in at])
        tables.append(sp.csr_matrix((values, np.concatenate(at), indptr), shape=(len(texts), ts.BUCKETS)))
    return Features(np.stack([encode(t) for t in texts]), sp.hstack(tables).tocsr())


class Model(NamedTuple):
    """logit = hidden @ hidden_F + ngrams @ ngrams_B + bias, before the calibrating line."""

    hidden_F: np.ndarray
    ngrams_B: np.ndarray
    bias: float

    def logit(self, x: Features) -> np.ndarray:
        return x.hidden_NF @ self.hidden_F + x.ngrams_NB @ self.ngrams_B + self.bias


def fit(x: Features, toxicity_N: np.ndarray, weight_N: np.ndarray) -> Model:
    p = np.clip(toxicity_N, CLIP, 1 - CLIP)
    y_N = np.log(p / (1 - p))
    weight_N = weight_N / weight_N.mean()
    hidden_F, hidden_bias = _ridge_hidden(x.hidden_NF.astype(np.float64), y_N, weight_N)
    ngrams_B, ngrams_bias = _ridge_ngrams(x.ngrams_NB, y_N, weight_N)
    a, b = 1 - SHARE_NGRAMS, SHARE_NGRAMS
    return Model(a * hidden_F, b * ngrams_B, a * hidden_bias + b * ngrams_bias)


def _ridge_hidden(x_NF: np.ndarray, y_N: np.ndarray, w_N: np.ndarray) -> tuple[np.ndarray, float]:
    mean, level = np.average(x_NF, axis=0, weights=w_N), np.average(y_N, weights=w_N)
    std = np.sqrt(np.average((x_NF - mean) ** 2, axis=0, weights=w_N)) + 1e-6
    z_NF = (x_NF - mean) / std
    gram = (z_NF.T * w_N) @ z_NF
    gram[np.diag_indices_from(gram)] += ALPHA_HIDDEN
    coefficients = scipy.linalg.solve(gram, z_NF.T @ (w_N * (y_N - level)), assume_a="pos") / std
    return coefficients, float(level - mean @ coefficients)


def _ridge_ngrams(x_NB: sp.csr_matrix, y_N: np.ndarray, w_N: np.ndarray) -> tuple[np.ndarray, float]:
    # In the dual, with the plain mean as bias: N x N is small beside B x B.
    level = np.average(y_N, weights=w_N)
    kernel = (x_NB @ x_NB.T).toarray()
    kernel[np.diag_indices_from(kernel)] += ALPHA_NGRAMS / w_N
    return x_NB.T @ scipy.linalg.solve(kernel, y_N - level, assume_a="pos"), float(level)


def rows(x: Features, which: np.ndarray) -> Features:
    return Features(x.hidden_NF[which], x.ngrams_NB[which])


def held_out_logits(x: Features, data: Data, fold_N: np.ndarray) -> np.ndarray:
    """Logit of every text by the model of the other folds."""
    out = np.empty(len(data.texts))
    for k in range(FOLDS):
        rest = fold_N != k
        out[~rest] = fit(rows(x, rest), data.toxicity_N[rest], data.weight_N[rest]).logit(rows(x, ~rest))
    return out


def calibrate(logit_N: np.ndarray, toxicity_N: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the line through the logits that has the smallest squared error in toxicity."""

    def error(line: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(line[0] * logit_N + line[1]))) - toxicity_N

    return tuple(scipy.optimize.least_squares(error, [1.0, 0.0]).x)


def report(name: str, predicted: np.ndarray, true: np.ndarray) -> None:
    error = predicted - true
    rho = spearmanr(predicted, true).statistic
    off, spread = error.mean(), np.abs(error).mean()
    print(f"{name:52} n {len(true):5}  Spearman {rho:.3f}  mean error {off:+.3f}  mean |error| {spread:.3f}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--write", action="store_true", help=f"store the numbers in {OUT.name}")
    write = options.parse_args().write
    data = read(Path(os.environ["COMPTRUST_DATA"]))
    x = features(data.texts)
    permuted = np.random.RandomState(0).permutation(data.prompt_N.max() + 1)
    fold_N = permuted[data.prompt_N] % FOLDS
    held_out = held_out_logits(x, data, fold_N)
    line = calibrate(held_out, data.toxicity_N)

    def probability(logit_N: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(line[0] * logit_N + line[1])))

    fifth = fold_N == 0
    report("a random fifth of the prompts and their texts", probability(held_out[fifth]), data.toxicity_N[fifth])
    for source in np.unique(data.source_N):
        which = data.source_N == source
        report(f"  five folds, {source}", probability(held_out[which]), data.toxicity_N[which])
    continued = np.char.startswith(data.source_N, "continuation")
    for source in np.unique(data.source_N[continued]):
        which = data.source_N == source
        for name, left_out in ((f"{source}, it alone left out", which), (f"{source}, all continuations left out", continued)):
            rest = ~left_out
            logit = fit(rows(x, rest), data.toxicity_N[rest], data.weight_N[rest]).logit(rows(x, which))
            report(name, probability(logit), data.toxicity_N[which])

    model = fit(x, data.toxicity_N, data.weight_N)
    words_B, chars_B = np.split(model.ngrams_B * line[0], 2)
    tensors = {
        "hidden": (model.hidden_F * line[0]).astype(np.float32),
        "words": words_B.astype(np.float16),
        "chars": chars_B.astype(np.float16),
        "bias": np.array([model.bias * line[0] + line[1]], dtype=np.float32),
    }
    stored = save(tensors, metadata=PROVENANCE)
    print(f"line {line[0]:.3f} x + {line[1]:+.3f}; {len(stored):,} bytes")
    if write:
        OUT.write_bytes(stored)
        print(f"written: {OUT.name}, version {ts.Builtin().version}")


if __name__ == "__main__":
    main()
