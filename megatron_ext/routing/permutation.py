"""Rows of hidden states in another order, as indices and, where they are long, as slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

SHORTEST_MEAN_RUN = 12
"""Rows: with shorter runs than these on average, moving rows one by one is faster than by slices."""


@dataclass
class Permutation:
    """Rows of one tensor, or of several one after the other, in another order: ``out[i] = rows[index[i]]``.

    Every field but ``runs`` is int32: an array on the host, a tensor where the rows are.

    Attributes:
        index: [outputs], the input row of each output row; -1: a filler, a row of zeros.
        inverse: [inputs], the output row that each input row became, -1: none. None when a row is used more than once.
        starts, uses: then the output rows of input row i are ``uses[starts[i] : starts[i + 1]]``; [inputs + 1] and
            [outputs without fillers].
        runs: the same as slices of the tensors, (tensor, first row, rows) in order; None when they are too short to be
            worth it, and with fillers.
    """

    index: np.ndarray
    inverse: np.ndarray | None
    starts: np.ndarray | None
    uses: np.ndarray | None
    runs: list[tuple[int, int, int]] | None

    @classmethod
    def of(
        cls, index: np.ndarray, inputs: Sequence[int], repeated: bool = False, fillers: int = 0
    ) -> "Permutation | None":
        """The map for ``index`` [outputs] into tensors of ``inputs`` rows; None for the identity of one tensor.

        Args:
            repeated: whether a row may be used more than once.
            fillers: rows of zeros that follow.
        """
        total, here = sum(inputs), np.arange(index.size)
        if len(inputs) == 1 and not fillers and index.size == total and np.array_equal(index, here):
            return None
        runs = None if fillers else _runs(index, inputs)
        inverse = starts = uses = None
        if repeated:
            uses = np.argsort(index, kind="stable").astype(np.int32)
            starts = np.concatenate([[0], np.bincount(index, minlength=total).cumsum()]).astype(np.int32)
        else:
            inverse = np.full(total, -1, dtype=np.int32)
            inverse[index] = here
        filled = np.concatenate([index, np.full(fillers, -1)]) if fillers else index
        return cls(filled.astype(np.int32), inverse, starts, uses, runs)


def _runs(index: np.ndarray, inputs: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """Runs of consecutive rows of one tensor in ``index``, if they are long: (tensor, first row, rows)."""
    if not index.size:
        return None
    starts = np.array([0, *accumulate(inputs)])
    tensor = np.searchsorted(starts, index, side="right") - 1
    new = np.ones(index.size, dtype=bool)
    new[1:] = (index[1:] != index[:-1] + 1) | (tensor[1:] != tensor[:-1])
    first = np.flatnonzero(new)
    if first.size * SHORTEST_MEAN_RUN > index.size:
        return None
    lengths = np.diff(first, append=index.size)
    return list(zip(tensor[first].tolist(), (index - starts[tensor])[first].tolist(), lengths.tolist()))
