"""Uncertainty by resampling seeds, and a benchmark's questions where the answers were kept.

In one replicate all models of a size are averaged over the same seeds, sampled with replacement: a seed fixes the
initial weights and the order of the data for every method, so methods are compared seed by seed. In the same replicate
all models answer the same pictures, sampled with replacement together with all their questions; checks of generated
pictures are resampled picture by picture. A figure of neither kind (a loss, an FID) varies with the seeds alone.

In numpy, not pandas: replicates are arrays, and their random streams and order of operations are fixed.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.analysis.results import Row


@dataclass
class Bootstrap:
    """The number of replicates, and replicates of figures over their questions.

    Attributes:
        replicates: 0 for none; every array is then the figure alone.
        questions: (run, evaluated_as, metric) -> the figure for each sample of the questions, [replicates].
    """

    replicates: int = 0
    seed: int = 0
    questions: dict[tuple[str | None, str | None, str], np.ndarray] = field(default_factory=dict)
    _seed_counts: dict = field(default_factory=dict, repr=False)

    def mean(self, rows: Mapping[int | None, Row], metric: str) -> np.ndarray:
        """Mean of a metric over seeds, [1 + replicates]; NaN in a replicate without any of these seeds."""
        values = np.array([self.values(row, metric) for row in rows.values()])  # [seeds, 1 + replicates]
        weights = np.array([self._weights(row) for row in rows.values()])
        total = weights.sum(axis=0)
        return np.divide((weights * values).sum(axis=0), total, out=np.full(total.shape, np.nan), where=total > 0)

    def values(self, row: Row, metric: str) -> np.ndarray:
        """A model's figure and its replicates over the questions, [1 + replicates]."""
        replicates = self.questions.get((row.run, row.evaluated_as, metric))
        if replicates is None:
            return np.full(1 + self.replicates, float(row.metrics[metric]))
        return np.concatenate([[row.metrics[metric]], replicates])

    def resample_seeds(self, rows: Iterable[Row]) -> None:
        """Sample the seeds of every size that occurs in ``rows``; call it before :meth:`mean`."""
        rows = list(rows)
        for size in {row.size for row in rows}:
            seeds = sorted({row.seed for row in rows if row.size == size}, key=str)
            random = np.random.default_rng([self.seed, zlib.crc32(str(size).encode())])
            sampled = random.integers(len(seeds), size=(self.replicates, len(seeds)))
            for number, seed in enumerate(seeds):
                self._seed_counts[size, seed] = np.concatenate([[1], (sampled == number).sum(axis=1)])

    def _weights(self, row: Row) -> np.ndarray:
        """How often each replicate has the row's seed, [1 + replicates]; first 1, for the figure itself."""
        return self._seed_counts[row.size, row.seed]


def interval(values: np.ndarray | None, level: float = 0.95) -> tuple[float, float] | None:
    """The central ``level`` of the replicates in [1 + replicates].

    None without replicates, and where they never differ: nothing could be resampled, which is not certainty.
    """
    if values is None or not np.isfinite(values[1:]).any() or np.nanmax(values[1:]) == np.nanmin(values[1:]):
        return None
    low, high = np.nanpercentile(values[1:], [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
