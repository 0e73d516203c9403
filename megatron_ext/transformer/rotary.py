"""Rotary position embedding, on the way into attention's order of rows."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_ext.routing.row_map import RowMap
from megatron_ext.transformer.function import Function
from megatron_ext.transformer.rows import by_slices, gather, gather_back


def rotary_table(inverse_frequencies: Tensor, positions: Tensor) -> Tensor:
    """Cosines and sines, [2, t, 1, 1, d / 2], of positions [t], in the precision of the frequencies."""
    angles = torch.outer(positions.to(inverse_frequencies.dtype), inverse_frequencies)[:, None, None]
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """``x`` [t, 1, ..., heads, d] turned by the angles of ``table``; the pairs are the halves of d (GPT-NeoX)."""
    return _Rotation.of(x, table)


def keys_and_values(by: RowMap | None, table: Tensor, *pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, turned, and values, [n, 1, groups, d] each, in the order of ``by`` (None: as they stand).

    Args:
        table: of the n keys' positions.
        pairs: where the rows come from, each [rows, 1, groups, 2, d]: a key and a value.
    """
    return _KeysAndValues.of(by, table, *pairs)


class _Rotation(Function):
    """(a, b) -> (a cos - b sin, b cos + a sin), one pass into one buffer; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor) -> Tensor:
        cosine, sine = table.to(x.dtype)
        ctx.save_for_backward(cosine, sine)
        return _rotate(x, cosine, sine, torch.empty(x.shape, dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        cosine, sine = ctx.saved_tensors
        made = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
        return _rotate(gradient, cosine, -sine, made), None


class _KeysAndValues(Function):
    """Every key and value is written once, where it belongs, and so is its gradient."""

    @staticmethod
    def forward(ctx, by: RowMap | None, table: Tensor, *pairs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.by, ctx.inputs = by, [x.shape[0] for x in pairs]
        cosine, sine = table.to(pairs[0].dtype)
        ctx.save_for_backward(cosine, sine)
        if by is not None and not by_slices(by, pairs[0]):
            by, pairs = None, [gather(by, pairs)]
        _, one, groups, _, d = pairs[0].shape
        key, value = (pairs[0].new_empty(cosine.shape[0], one, groups, d) for _ in range(2))
        for at, source in _moves(by, pairs):
            _rotate(source[..., 0, :], cosine[at], sine[at], key[at])
            value[at].copy_(source[..., 1, :])
        return key, value

    @staticmethod
    def backward(ctx, of_key: Tensor, of_value: Tensor) -> tuple[Tensor | None, ...]:
        by, inputs = ctx.by, ctx.inputs
        cosine, sine = ctx.saved_tensors
        sine = -sine
        slices = by is None or by_slices(by, of_key)
        exact = by is None or not slices or (by.inverse is not None and by.inverse.shape[0] == by.index.shape[0])
        rows = inputs if slices else [of_key.shape[0]]
        shape = (of_key.shape[1], of_key.shape[2], 2, of_key.shape[3])
        made = [(of_key.new_empty if exact else of_key.new_zeros)(n, *shape) for n in rows]
        for at, target in _moves(by if slices else None, made):
            if slices and by is not None and by.inverse is None:  # some rows are keys of several segments
                turned = _rotate(of_key[at], cosine[at], sine[at], torch.empty_like(of_key[at]))
                target[..., 0, :].add_(turned)
                target[..., 1, :].add_(of_value[at])
            else:
                _rotate(of_key[at], cosine[at], sine[at], target[..., 0, :])
                target[..., 1, :].copy_(of_value[at])
        return None, None, *(made if slices else gather_back(by, made[0], inputs))


def _moves(by: RowMap | None, sources: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Where in the order of ``by`` which rows of the sources stand."""
    start = 0
    for source, first, n in [(0, 0, sources[0].shape[0])] if by is None else by.runs:
        yield slice(start, start + n), sources[source][first : first + n]
        start += n


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, made: Tensor) -> Tensor:
    (a, b), (a_, b_) = x.chunk(2, dim=-1), made.chunk(2, dim=-1)
    torch.mul(a, cosine, out=a_).addcmul_(b, sine, value=-1)
    torch.mul(b, cosine, out=b_).addcmul_(a, sine)
    return made
