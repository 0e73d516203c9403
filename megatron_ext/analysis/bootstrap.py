"""Uncertainty by resampling: of seeds, and of a benchmark's questions where the answers were kept.

In one replicate all models of a size are averaged over the same seeds, drawn with replacement: a seed fixes initial
weights and the order of the data for every method, so methods are compared seed by seed. In the same replicate all
models answer the same pictures, drawn with replacement with all their questions. What pictures show is drawn again
picture by picture. A figure of neither (a loss, an FID) varies with the seeds alone.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.analysis.results import Row


@dataclass
class Bootstrap:
    """How often to resample, and replicates of figures over their questions.

    Attributes:
        replicates: 0: none, every array is the figure alone.
        questions: (run, evaluated_as, metric) -> the figure for each drawing of the questions, [replicates].
    """

    replicates: int = 0
    seed: int = 0
    questions: dict[tuple[str | None, str | None, str], np.ndarray] = field(default_factory=dict)
    _drawn: dict = field(default_factory=dict, repr=False)

    def mean(self, rows: Mapping[int | None, Row], metric: str) -> np.ndarray:
        """Mean of a metric over seeds, [1 + replicates]; NaN in a replicate that drew none of these seeds."""
        values = np.array([self.values(row, metric) for row in rows.values()])  # [seeds, 1 + replicates]
        weights = np.array([self._weights(row) for row in rows.values()])
        total = weights.sum(axis=0)
        return np.divide((weights * values).sum(axis=0), total, out=np.full(total.shape, np.nan), where=total > 0)

    def values(self, row: Row, metric: str) -> np.ndarray:
        """One model's figure and its replicates over the questions, [1 + replicates]."""
        drawn = self.questions.get((row.run, row.evaluated_as, metric))
        if drawn is None:
            return np.full(1 + self.replicates, float(row.metrics[metric]))
        return np.concatenate([[row.metrics[metric]], drawn])

    def draw_seeds(self, rows: Iterable[Row]) -> None:
        """Selection the seeds of every size that occurs in ``rows``; to be called before anything is averaged."""
        rows = list(rows)
        for size in {row.size for row in rows}:
            seeds = sorted({row.seed for row in rows if row.size == size}, key=str)
            random = np.random.default_rng([self.seed, zlib.crc32(str(size).encode())])
            drawn = random.integers(len(seeds), size=(self.replicates, len(seeds)))
            for number, seed in enumerate(seeds):
                self._drawn[size, seed] = np.concatenate([[1], (drawn == number).sum(axis=1)])

    def _weights(self, row: Row) -> np.ndarray:
        """How often the row's seed is drawn, [1 + replicates]; 1 in the first place, which is the figure itself."""
        return self._drawn[row.size, row.seed]


def interval(values: np.ndarray | None, level: float = 0.95) -> tuple[float, float] | None:
    """The central ``level`` of the replicates in [1 + replicates]; None where they are none or never differ: then
    nothing could be resampled, which is not certainty."""
    if values is None or not np.isfinite(values[1:]).any() or np.nanmax(values[1:]) == np.nanmin(values[1:]):
        return None
    low, high = np.nanpercentile(values[1:], [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
