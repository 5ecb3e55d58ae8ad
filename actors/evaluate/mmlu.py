"""MMLU: 57 subjects, five examples each, the letter of the right choice; the benign utility beside the trust dimensions.

Formula, source and deviations: docs/trust/mmlu.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..intervals import wilson
from ..record import UTILITY
from . import conventions as cv
from .judging import denied, failure, keyed, plain
from .protocol import Decoding, Item, Judgement, Message, MetricRow, Outcome

LETTERS = "ABCD"
SHOTS = 5
_LETTER = re.compile(r"(?<![A-Za-z])([A-D])(?![A-Za-z])")
#: After the article at the start of a sentence ("A cat"); "A is right" and "A because" are answers.
_NOUN = re.compile(r"\s+(?!(?:is|was|because|since|as|and|or)\b)[a-z]")


def parse(text: str) -> str | None:
    """The fork's reading: the first character, upper-cased, if it is a letter A-D; here after blanks, which tokenizers add."""
    first = text.lstrip()[:1].upper()
    return first if first and first in LETTERS else None


def read(text: str) -> str | None:
    """Ours: the first letter A-D that stands alone ("The answer is (B)"), those denied ("Not B") and capital "A" at the start of
    a sentence aside.
    """
    text = plain(text)
    for match in _LETTER.finditer(text):
        if denied(text[: match.start()]):
            continue
        inside = re.search(r"\w\s+$", text[: match.start()])  # of a sentence, where an article would be small
        if match[1] != "A" or inside or not _NOUN.match(text, match.end()):
            return match[1]
    return None


def _shown(r: Mapping[str, Any], answer: bool) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, r["choices"], strict=True))
    said = f" {LETTERS[r['answer']]}" if answer else ""
    return f"{r['question']}\n{choices}\nAnswer:{said}"


class MMLU:
    dimension = "mmlu"

    def items(self, pack: Any) -> list[Item]:
        records = pack.records("mmlu")
        dev: dict[str, list[Mapping[str, Any]]] = {}
        for r in records:
            if r["split"] == "dev":
                dev.setdefault(r["subject"], []).append(r)
        out = []
        for r in records:
            if r["split"] == "test":
                record = {**r, "dev": dev.get(r["subject"], [])[:SHOTS]}
                out.append(Item(r["id"], self.dimension, r["subject"], r["id"], record, {"label": LETTERS[r["answer"]]}))
        return out

    def messages(self, item: Item) -> list[Message]:
        r = item.record
        subject = r["subject"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}."
        return [Message("user", "\n\n".join([head, *(_shown(d, True) for d in r["dev"]), _shown(r, False)]))]

    def decoding(self, item: Item, suite: str) -> Decoding:
        return Decoding(16)

    def judge(self, target: Mapping[str, Any], text: str, finish_reason: str) -> Judgement:
        return failure(text) or keyed(text, read(text), target["label"])

    def parts(self, rows: Sequence[cv.Row]) -> tuple[cv.Cells, cv.Combine]:
        """All questions alike, as in the published score (micro average); each is its own cluster."""
        cells = {"": [(r["item"], float(r["outcome"] == Outcome.CORRECT)) for r in rows]}
        return cells, lambda means: 100 * means[""]

    def metrics(self, rows: Sequence[cv.Row], suite: str) -> list[MetricRow]:
        subjects = cv.by(rows, "scenario")
        right = {
            "comptrust": {s: [float(r["outcome"] == Outcome.CORRECT) for r in rs] for s, rs in subjects.items()},
            "comp-trust": {s: [float(parse(r["text"]) == r["target"]["label"]) for r in rs] for s, rs in subjects.items()},
        }
        out = []
        for convention, cells in right.items():
            if not rows:
                continue
            every = [v for values in cells.values() for v in values]
            macro = 100 * float(np.mean([np.mean(v) for v in cells.values()]))
            low = high = macro_low = macro_high = None
            if convention == "comptrust":
                low, high = (100 * b for b in wilson(sum(every), len(every)))
                pairs = {s: [(f"{s}/{i}", v) for i, v in enumerate(values)] for s, values in cells.items()}
                _, macro_low, macro_high = cv.estimate(pairs, lambda m: 100 * cv.nanmean(m.values()))
            out.append(MetricRow(convention, UTILITY, "", "mmlu", 100 * float(np.mean(every)), len(every), low, high))
            out.append(MetricRow(convention, UTILITY, "", "mmlu_macro", macro, len(every), macro_low, macro_high))
        failed = {str(o): sum(r["outcome"] == o for r in rows) for o in cv.FAILURES}
        refused = {"refusal": sum(r["outcome"] == Outcome.REFUSED for r in rows)}
        out += [m._replace(metric=f"mmlu_{m.metric}") for m in cv.rates(UTILITY, "", {**refused, **failed}, rows)]
        for s, rs in subjects.items():
            out += cv.rates(UTILITY, s, {"mmlu_accuracy": sum(r["outcome"] == Outcome.CORRECT for r in rs)}, rs)
        return out


TASK = MMLU()
