"""Orders of rows in plain torch."""

import torch
from torch import Tensor

from megatron_ext.routing.permutation import Permutation


def gather(by: Permutation, rows: Tensor) -> Tensor:
    """``rows`` [inputs, ...] in the order of ``by``, [outputs, ...]."""
    if by_slices(by, rows):
        return torch.cat([rows[first : first + n] for _, first, n in by.runs])
    return select(rows, by.index)


def gather_back(by: Permutation, rows: Tensor, inputs: int) -> Tensor:
    """The sum of the output rows [outputs, ...] that each input row became, [inputs, ...]."""
    if by.inverse is None:
        return sum_rows(by, rows, inputs).to(rows.dtype)
    if not by_slices(by, rows):
        return select(rows, by.inverse)
    out = (rows.new_empty if covers(by) else rows.new_zeros)(inputs, *rows.shape[1:])
    for (_, first, n), piece in zip(by.runs, rows.split([n for *_, n in by.runs])):
        out[first : first + n].copy_(piece)
    return out


def by_slices(by: Permutation, rows: Tensor) -> bool:
    """On CPUs, where a slice is one copy."""
    return by.runs is not None and rows.device.type == "cpu"


def covers(by: Permutation) -> bool:
    """Whether every input row became an output row, in a map by slices."""
    return by.inverse is not None and by.inverse.shape == by.index.shape


def select(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]``, zeros where ``index`` is -1."""
    if not rows.shape[0]:
        return rows.new_zeros(index.shape[0], *rows.shape[1:])
    out = rows.index_select(0, index.clamp(min=0))
    # On CPUs a look costs less than a pass over the rows; on GPUs it would wait for the device.
    if rows.device.type != "cpu" or bool((index < 0).any()):
        out.masked_fill_((index < 0).view(-1, *[1] * (rows.dim() - 1)), 0)
    return out


def sum_rows(by: Permutation, rows: Tensor, inputs: int) -> Tensor:
    """Like :func:`gather_back`, in float32 at least: the sum is rounded once, by whoever stores it."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(inputs + 1, *rows.shape[1:], dtype=wide)  # the last one takes fillers
    index = torch.where(by.index < 0, inputs, by.index)
    return total.index_add_(0, index, rows.to(wide))[:inputs]
