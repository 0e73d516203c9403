"""Permutations of rows in torch operators."""

import torch
from torch import Tensor

from megatron_ext.routing.permutation import Permutation


def permute(permutation: Permutation, rows: Tensor) -> Tensor:
    """``rows`` [inputs, ...] in the order of ``permutation``, [outputs, ...]."""
    if by_slices(permutation, rows):
        return torch.cat([rows[first : first + n] for _, first, n in permutation.runs])
    return select(rows, permutation.index)


def unpermute(permutation: Permutation, rows: Tensor, inputs: int) -> Tensor:
    """For each input row the sum of its output rows in ``rows`` [outputs, ...]: [inputs, ...]."""
    if permutation.inverse is None:
        return sum_rows(permutation, rows, inputs).to(rows.dtype)
    if not by_slices(permutation, rows):
        return select(rows, permutation.inverse)
    out = (rows.new_empty if covers(permutation) else rows.new_zeros)(inputs, *rows.shape[1:])
    runs = permutation.runs
    for (_, first, n), run in zip(runs, rows.split([n for *_, n in runs])):
        out[first : first + n].copy_(run)
    return out


def by_slices(permutation: Permutation, rows: Tensor) -> bool:
    """Whether to copy slices: on CPUs, where each is one copy."""
    return permutation.runs is not None and rows.device.type == "cpu"


def covers(permutation: Permutation) -> bool:
    """Whether every input row became an output row, in a permutation by slices."""
    return permutation.inverse is not None and permutation.inverse.shape == permutation.index.shape


def select(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]``, zeros where ``index`` is -1."""
    if not rows.shape[0]:
        return rows.new_zeros(index.shape[0], *rows.shape[1:])
    out = rows.index_select(0, index.clamp(min=0))
    # On CPUs this check is cheaper than a pass over the rows; on GPUs it would wait for the device.
    if rows.device.type != "cpu" or bool((index < 0).any()):
        out.masked_fill_((index < 0).view(-1, *[1] * (rows.dim() - 1)), 0)
    return out


def sum_rows(permutation: Permutation, rows: Tensor, inputs: int) -> Tensor:
    """Like :func:`unpermute`, in float32 at least: the caller rounds the sum once."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(inputs + 1, *rows.shape[1:], dtype=wide)  # the last row takes fillers
    index = torch.where(permutation.index < 0, inputs, permutation.index)
    return total.index_add_(0, index, rows.to(wide))[:inputs]
