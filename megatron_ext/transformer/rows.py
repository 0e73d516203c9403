"""Moving whole rows: the pieces of hidden states that take part, and orders of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.routing.row_map import RowMap
from megatron_ext.transformer.function import Function


def join(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """``pieces`` one after the other; a single piece as it is, without a copy; none: no rows of ``like``."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces)) if pieces else like[:0]


def arrange(by: RowMap | None, rows: Tensor) -> Tensor:
    """``rows`` [inputs, ...] as [outputs, ...] in the order of ``by``; None: as they are."""
    return rows if by is None else _Arrange.of(by, rows)


def restore(by: RowMap | None, rows: Tensor) -> Tensor:
    """What :func:`arrange` by the same map brought into order, [outputs, ...], back in its place,
    [inputs, ...]; rows that went nowhere are zeros."""
    return rows if by is None else _Restore.of(by, rows)


class _Arrange(Function):
    @staticmethod
    def forward(ctx, by: RowMap, rows: Tensor) -> Tensor:
        ctx.by, ctx.inputs = by, rows.shape[0]
        return gather(by, [rows])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gather_back(ctx.by, gradient, [ctx.inputs])[0]


class _Restore(Function):
    @staticmethod
    def forward(ctx, by: RowMap, rows: Tensor) -> Tensor:
        ctx.by = by
        return gather_back(by, rows, [by.inverse.shape[0]])[0]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gather(ctx.by, [gradient])


def gather(by: RowMap, sources: Sequence[Tensor]) -> Tensor:
    """Rows of ``sources``, one after the other, in the order of ``by``."""
    if by_slices(by, sources[0]):
        return torch.cat([sources[source][first : first + n] for source, first, n in by.runs])
    return _select(sources[0] if len(sources) == 1 else torch.cat(list(sources)), by.index)


def gather_back(by: RowMap, rows: Tensor, inputs: Sequence[int]) -> Sequence[Tensor]:
    """The sum of the output rows that each input row became."""
    if by_slices(by, rows):
        covered = by.inverse is not None and by.inverse.shape[0] == by.index.shape[0]
        make = rows.new_empty if covered else rows.new_zeros
        made = [make(n, *rows.shape[1:]) for n in inputs]
        for (source, first, n), piece in zip(by.runs, rows.split([n for *_, n in by.runs])):
            place = made[source][first : first + n]
            place.copy_(piece) if by.inverse is not None else place.add_(piece)
        return made
    if by.inverse is None:
        made = rows.new_zeros(sum(inputs), *rows.shape[1:]).index_add_(0, by.index, rows)
    elif rows.shape[0]:
        made = _select(rows, by.inverse)
    else:
        made = rows.new_zeros(sum(inputs), *rows.shape[1:])
    return made.split(inputs)


def _select(rows: Tensor, index: Tensor) -> Tensor:
    if not rows.shape[0]:
        return rows.new_zeros(index.shape[0], *rows.shape[1:])
    return rows.index_select(0, index.clamp(min=0)).masked_fill_((index < 0).view(-1, *[1] * (rows.dim() - 1)), 0)


def by_slices(by: RowMap, rows: Tensor) -> bool:
    """On CPUs, where a slice is one copy; on GPUs one kernel moves all rows."""
    return by.runs is not None and rows.device.type == "cpu"
