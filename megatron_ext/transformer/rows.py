"""Moving whole rows: the pieces of hidden states that take part, and orders of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.routing.route import RowMap


def join(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """``pieces`` one after the other; a single piece as it is, without a copy; none: no rows of ``like``."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces)) if pieces else like[:0]


def arrange(rows: Tensor, by: RowMap | None) -> Tensor:
    """``rows`` [inputs, ...] as [outputs, ...] in the order of ``by``; None: as they are."""
    return rows if by is None else _Arrange.apply(rows, by)


def restore(rows: Tensor, by: RowMap | None) -> Tensor:
    """What :func:`arrange` by the same map brought into order, [outputs, ...], back in its place, [inputs, ...]; rows
    that went nowhere are zeros."""
    return rows if by is None else _Restore.apply(rows, by)


class _Arrange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, by: RowMap) -> Tensor:
        ctx.by, ctx.inputs = by, rows.shape[0]
        return rows.index_select(0, by.index)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.by.inverse is not None:
            return _inverse(gradient, ctx.by), None
        zeros = gradient.new_zeros(ctx.inputs, *gradient.shape[1:])
        return zeros.index_add_(0, ctx.by.index, gradient), None


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, by: RowMap) -> Tensor:
        ctx.by = by
        return _inverse(rows, by)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.by.index), None


def _inverse(rows: Tensor, by: RowMap) -> Tensor:
    if not rows.shape[0]:
        return rows.new_zeros(by.inverse.shape[0], *rows.shape[1:])
    made = rows.index_select(0, by.inverse)
    return made if by.holes is None else made.index_fill_(0, by.holes, 0)
