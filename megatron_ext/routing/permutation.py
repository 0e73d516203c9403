"""Permutations of rows of hidden states, as indices and, where runs are long, as slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

SHORTEST_MEAN_RUN = 12
"""Rows: where runs are shorter than this on average, moving single rows is faster than moving slices."""


@dataclass
class Permutation:
    """A new order for the rows of one tensor, or of several tensors in sequence: ``out[i] = rows[index[i]]``.

    Every field except ``runs`` is int32: an array on the host, a tensor on the device of the rows.

    Attributes:
        index: [outputs], the input row of each output row; -1: a filler, a row of zeros.
        inverse: [inputs], the output row of each input row, -1: none. None when rows may be used more than once.
        starts, uses: in that case, the output rows of input row i are ``uses[starts[i] : starts[i + 1]]``; [inputs + 1]
            and [outputs without fillers].
        runs: the same permutation as slices of the tensors, (tensor, first row, rows) in order; None with fillers, and
            where slices would be too short to pay off.
    """

    index: np.ndarray
    inverse: np.ndarray | None
    starts: np.ndarray | None
    uses: np.ndarray | None
    runs: list[tuple[int, int, int]] | None

    @classmethod
    def of(cls, index: np.ndarray, inputs: Sequence[int], repeated: bool = False) -> "Permutation | None":
        """The permutation for ``index`` [outputs] into tensors of ``inputs`` rows; None for the identity on one tensor.

        Args:
            index: input row of each output row; -1 for fillers.
            repeated: whether a row may be used more than once.
        """
        total, outputs = sum(inputs), np.flatnonzero(index >= 0)
        rows = index[outputs]
        if len(inputs) == 1 and index.size == rows.size == total and np.array_equal(rows, outputs):
            return None
        runs = _runs(index, inputs) if rows.size == index.size else None
        inverse = starts = uses = None
        if repeated:
            uses = outputs[np.argsort(rows, kind="stable")].astype(np.int32)
            starts = np.concatenate([[0], np.bincount(rows, minlength=total).cumsum()]).astype(np.int32)
        else:
            inverse = np.full(total, -1, dtype=np.int32)
            inverse[rows] = outputs
        return cls(index.astype(np.int32), inverse, starts, uses, runs)


def _runs(index: np.ndarray, inputs: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """Runs of consecutive rows of one tensor in ``index``, as (tensor, first row, rows); None where they are short."""
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
