"""Rows of hidden states in another order, as indices and, where they are long, as slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

SHORTEST_MEAN_RUN = 12
"""Rows: with shorter runs than these on average, moving rows one by one is faster than by slices."""


@dataclass
class RowMap:
    """Rows of one tensor, or of several one after the other, in another order: ``out[i] = rows[index[i]]``.

    Attributes:
        index: [outputs].
        inverse: [inputs], where each input row went; None when a row is used more than once.
        holes: input rows that went nowhere (``inverse`` holds 0 for them); None when there are none.
        runs: the same as slices of the tensors, (tensor, first row, rows) in order; None when they are too short to be
            worth it.
    """

    index: Tensor
    inverse: Tensor | None
    holes: Tensor | None
    runs: list[tuple[int, int, int]] | None

    @classmethod
    def of(cls, index: Tensor, inputs: Sequence[int], repeated: bool = False) -> "RowMap | None":
        """The map for ``index`` [outputs] into tensors of ``inputs`` rows; None for the identity of one tensor."""
        total, here = sum(inputs), torch.arange(index.numel())
        if len(inputs) == 1 and index.numel() == total and torch.equal(index, here):
            return None
        runs = _runs(index, inputs)
        if repeated:
            return cls(index, None, None, runs)
        inverse = torch.full((total,), -1).index_copy_(0, index, here)
        holes = (inverse < 0).nonzero().flatten()
        return cls(index, inverse.clamp_(min=0), holes if holes.numel() else None, runs)


def _runs(index: Tensor, inputs: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """Runs of consecutive rows of one tensor in ``index``, if they are long: (tensor, first row, rows)."""
    if not index.numel():
        return None
    starts = torch.tensor([0, *accumulate(inputs)])
    tensor = torch.searchsorted(starts, index, right=True) - 1
    new = torch.ones_like(index, dtype=torch.bool)
    new[1:] = (index[1:] != index[:-1] + 1) | (tensor[1:] != tensor[:-1])
    first = new.nonzero().flatten()
    if first.numel() * SHORTEST_MEAN_RUN > index.numel():
        return None
    lengths = torch.diff(first, append=first.new_tensor([index.numel()]))
    return list(zip(tensor[first].tolist(), (index - starts[tensor])[first].tolist(), lengths.tolist()))
