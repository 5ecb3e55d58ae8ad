"""The identity of a cell: one point of the grid, and the two digests by which its work is found again.

Canonical form: JSON with sorted keys, no blanks, floats by ``repr``, SHA-256, first 24 hex digits. ``tests/test_cell.py`` pins it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

#: Methods a grid may name, in the order reports show them.
METHODS = ("dense", "rtn", "gptq", "awq", "smoothquant", "llm_int8", "nf4", "fp4", "magnitude", "wanda", "sparsegpt", "gblm")
#: Methods whose code was repaired since with other weights as the result; what was made before is made again.
#: AWQ and SmoothQuant folded scales wrongly into norms like Gemma's in 16 bits; on symmetric grids the largest weights shrank.
REVISIONS = {"rtn": 1, "gptq": 1, "awq": 2, "smoothquant": 2, "sparsegpt": 1}
#: The eight trust dimensions, ours.
DIMENSIONS = ("toxicity", "stereotype", "adversarial", "ood", "demonstrations", "privacy", "ethics", "fairness")


def canonical(value: Any) -> str:
    """The one text of a JSON-like value: sorted keys, no blanks, ASCII; NaN and infinity are a ``ValueError``."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """24 hex digits (96 bits) of SHA-256 over the canonical form."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:24]


class Cell(BaseModel):
    """One model, one compression, one evaluation. Everything that changes a number is a field; nothing else is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="MODEL as written: hub id, directory or package:NAME")
    revision: str = Field(description="resolved commit (hub) or content digest (directory, package)")
    method: str = Field(description="one of METHODS")
    params: Mapping[str, Any] = Field(default_factory=dict, description="every parameter of the method, defaults filled in")
    backend: str = Field(
        default="comptrust", description="comptrust, bitsandbytes, autoawq, auto-gptq, gptqmodel, llmcompressor"
    )
    dtype: str = Field(default="float32", description="dtype in which the dense weights are held and the model runs")
    template: str = Field(default="", description="digest of the chat template; empty if the tokenizer has none")
    calibration: Mapping[str, Any] | None = Field(
        default=None, description="the calibration block, for people; its digest is identity"
    )
    calibration_digest: str | None = Field(
        default=None, description="digest of the calibration token ids; None: no calibration"
    )
    suite: str = Field(default="smoke", description="smoke, standard or full, for people; `evaluation` is identity")
    evaluation: str = Field(default="", description="digest of evaluated item ids, prompts, decoding, samples and data pack")

    @property
    def artifact_key(self) -> str:
        """Names the compressed weights: equal keys, equal weights."""
        revised = {"code": REVISIONS[self.method]} if self.backend == "comptrust" and self.method in REVISIONS else {}
        return digest(
            revised
            | {
                "revision": self.revision,
                "method": self.method,
                "params": dict(self.params),
                "backend": self.backend,
                "dtype": self.dtype,
                "template": self.template,
                "calibration": self.calibration_digest,
            }
        )

    @property
    def key(self) -> str:
        """Names the cell in the record, in W&B and for resume: artefact and evaluation."""
        return digest({"artifact": self.artifact_key, "evaluation": self.evaluation})

    @property
    def label(self) -> str:
        """Short name for people: ``gptq 4 g64``, ``wanda 2:4``, ``dense``."""
        p = self.params
        parts = [self.method]
        if p.get("bits"):
            parts.append(str(p["bits"]))
        if p.get("group_size"):
            parts.append(f"g{p['group_size']}")
        if p.get("pattern") and p["pattern"] != "unstructured":
            parts.append(p["pattern"])
        elif p.get("sparsity"):
            parts.append(f"{p['sparsity']:.0%}")
        return " ".join(parts)
