"""Permutations of rows: the definitions of what ``permute`` and ``unpermute`` of ``kernels/functions.py`` compute."""

from torch import Tensor

from megatron_ext.routing.permutation import Permutation


def permute(permutation: Permutation, rows: Tensor) -> Tensor:
    """``rows[index]``, [inputs, ...] to [outputs, ...]; fillers are zeros."""
    return _select(rows, permutation.index)


def unpermute(permutation: Permutation, rows: Tensor) -> Tensor:
    """The inverse of :func:`permute`, [outputs, ...] to [inputs, ...]; input rows without an output row are zeros."""
    return _select(rows, permutation.inverse)


def _select(rows: Tensor, index: Tensor) -> Tensor:
    return rows[index.clamp(min=0)].where((index >= 0).view(-1, *[1] * (rows.dim() - 1)), 0)
