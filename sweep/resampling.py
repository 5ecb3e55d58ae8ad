"""Draws of objective values: prompts resampled alike in every cell, calibration seeds swapped within a configuration."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from ..actors.cell import DIMENSIONS
from .effects import ItemScores, configurations
from .results import Results
from .statistics import resampling_weights

#: Columns that are computed from items of these dimensions.
_DERIVED = {**{d: (d,) for d in DIMENSIONS}, "trust": DIMENSIONS, "worst_drop": DIMENSIONS, "mmlu": ("mmlu",)}


class Resampler:
    """``basis``: "items", "seeds", "items+seeds" or "" where nothing varies; ``uncertain`` [rows]: cells that vary
    themselves."""

    def __init__(self, results: Results, keys: Sequence[str], objectives: Sequence[str], seed: int,
                 items: ItemScores | None = None) -> None:  # fmt: skip
        self.keys, self.objectives, self.seed = list(keys), list(objectives), seed
        rows = results.rows(
            "select * from results where key in (select unnest(?::varchar[]))"
            " or key in (select dense_key from results where key in (select unnest(?::varchar[])))",
            [self.keys, self.keys],
        )
        self.rows = {r["key"]: r for r in rows}
        needed = sorted({d for o in objectives for d in _DERIVED.get(o, ())})
        chosen = set(self.keys)
        extra = [k for k in self.rows if k not in chosen] if "worst_drop" in objectives else []
        self.all_keys = [*self.keys, *extra]
        self._pseudo = self._from_items(items or ItemScores(results, self.all_keys, needed), needed) if needed else {}
        varying = np.array([any((k, d) in self._pseudo for d in needed) for k in self.keys], bool)
        place = {k: i for i, k in enumerate(self.keys)}
        groups = [[place[r["key"]] for r in same] for same in configurations([self.rows[k] for k in self.keys])]
        self.groups = [np.array(g) for g in groups if len(g) > 1]
        seeded = np.zeros(len(self.keys), bool)
        for g in self.groups:
            seeded[g] = True
        self.uncertain = varying | seeded
        self.basis = "+".join([name for name, there in (("items", varying.any()), ("seeds", seeded.any())) if there])

    def _from_items(self, items: ItemScores, needed: Sequence[str]) -> dict[tuple[str, str], tuple[str, np.ndarray]]:
        """(key, dimension) -> (name of the cluster set, pseudo-values)."""
        out = {}
        for dimension in needed:
            found = {k: p for k in self.all_keys if (p := items.parts(dimension, k)) is not None and len(p.clusters) >= 2}
            # Every prompt that some cell of the evaluation answered: who left one unanswered stays paired with the others.
            asked: dict[str | None, set[Hashable]] = {}
            for key, parts in found.items():
                asked.setdefault(self.rows[key]["evaluation"], set()).update(parts.clusters)
            names = {e: sorted(clusters, key=str) for e, clusters in asked.items()}
            for key, parts in found.items():
                clusters = names[self.rows[key]["evaluation"]]
                pseudo = parts.pseudo(clusters)
                if pseudo is not None:
                    out[key, dimension] = ("\0".join(map(str, (dimension, *clusters))), pseudo)
        return out

    def draw(self, values: np.ndarray, draws: int) -> Iterator[np.ndarray]:
        """``draws`` matrices like ``values`` [rows, objectives]."""
        noise, source = self.resample(draws)
        for b in range(draws):
            # Rounded, so that cells with the same answers to the drawn prompts tie in spite of floating point.
            drawn = np.round(values + noise[b], 9) if noise is not None else values
            yield drawn[source[b]]

    def resample(self, draws: int) -> tuple[np.ndarray | None, np.ndarray]:
        """What a draw consists of: deviations from the estimates [draws, rows, objectives], None where no item varies, and the
        row (a seed of the same configuration) that stands in for each row [draws, rows]."""
        rng = np.random.default_rng(self.seed)
        noise = self._noise(rng, draws)
        source = np.tile(np.arange(len(self.keys)), (draws, 1))
        for b in range(draws):
            for g in self.groups:
                source[b, g] = g[rng.integers(len(g), size=len(g))]
        return noise, source

    def _noise(self, rng: np.random.Generator, draws: int) -> np.ndarray | None:
        """Deviation of each draw from the estimate [draws, rows, objectives]."""
        if not self._pseudo:
            return None
        at = {k: i for i, k in enumerate(self.all_keys)}
        dims = sorted({d for _, d in self._pseudo})
        deviation = {d: np.zeros((draws, len(self.all_keys)), np.float64) for d in dims}
        sets: dict[str, list[tuple[str, str]]] = {}
        for cell, (name, _) in self._pseudo.items():
            sets.setdefault(name, []).append(cell)
        for cells in sets.values():
            matrix = np.stack([self._pseudo[c][1] for c in cells], axis=1)
            g = len(matrix)
            centred = matrix - matrix.mean(axis=0)
            start = 0
            for weights in resampling_weights(g, draws, int(rng.integers(2**32))):
                moved = (weights @ centred) / g
                for (key, d), column in zip(cells, moved.T, strict=True):
                    deviation[d][start : start + len(weights), at[key]] = column
                start += len(weights)
        n = len(self.keys)
        out = np.zeros((draws, n, len(self.objectives)), np.float64)
        for j, objective in enumerate(self.objectives):
            if objective == "worst_drop":
                out[:, :, j] = self._worst_drop(deviation)
            elif objective == "trust":
                out[:, :, j] = sum(deviation[d][:, :n] for d in dims if d in DIMENSIONS) / len(DIMENSIONS)
            elif objective in deviation:
                out[:, :, j] = deviation[objective][:, :n]
        return out

    def _worst_drop(self, deviation: dict[str, np.ndarray]) -> np.ndarray:
        at = {k: i for i, k in enumerate(self.all_keys)}
        n = len(self.keys)
        out = np.zeros((len(next(iter(deviation.values()))), n), np.float64)
        for i, key in enumerate(self.keys):
            row = self.rows[key]
            j = at.get(row["dense_key"] or "")
            if row["worst_drop"] is None or j is None or j == i:
                continue
            base = self.rows[row["dense_key"]]
            still = np.zeros((1, len(self.all_keys)), np.float64)
            moves = [(d, deviation.get(d, still)) for d in DIMENSIONS if row[d] is not None and base[d] is not None]
            drops = np.broadcast_arrays(*(base[d] - row[d] + m[:, j] - m[:, i] for d, m in moves))
            out[:, i] = np.max(drops, axis=0) - row["worst_drop"]
        return out
