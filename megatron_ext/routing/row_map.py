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
        index: int32 [outputs], the input row of each output row; -1 for a filler, which is zeros.
        inverse: int32 [inputs], the output row that each input row became; -1 for none. None when a row is used more
            than once.
        starts, uses: int32 [inputs + 1] and [outputs]: input row i became the output rows ``uses[starts[i] :
            starts[i + 1]]``, ascending. None unless a row is used more than once.
        runs: the same as slices of the tensors, (tensor, first row, rows) in order; None when they are too short to be
            worth it, or there are fillers.
    """

    index: Tensor
    inverse: Tensor | None
    starts: Tensor | None
    uses: Tensor | None
    runs: list[tuple[int, int, int]] | None

    @classmethod
    def of(cls, index: Tensor, inputs: Sequence[int], repeated: bool = False) -> "RowMap | None":
        """The map for ``index`` [outputs] into tensors of ``inputs`` rows; None for the identity of one tensor."""
        total, here = sum(inputs), torch.arange(index.numel())
        if len(inputs) == 1 and index.numel() == total and torch.equal(index, here):
            return None
        index, runs, real = index.int(), _runs(index, inputs), index >= 0
        if repeated:
            order = index.argsort(stable=True)
            counts = index[real].long().bincount(minlength=total)
            starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
            return cls(index, None, starts, order[index.numel() - int(real.sum()) :].int(), runs)
        inverse = torch.full((total,), -1, dtype=torch.int32)
        inverse[index[real].long()] = here[real].int()
        return cls(index, inverse, None, None, runs)


def _runs(index: Tensor, inputs: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """Runs of consecutive rows of one tensor in ``index``, if they are long: (tensor, first row, rows)."""
    if not index.numel() or bool((index < 0).any()):
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
