"""Queries, keys and values in plain torch: gathered, turned and split in as few passes as can be.

A position turns the pairs (a, b) that the two halves of a head make (GPT-NeoX): (a cos - b sin, b cos + a sin). The
gradient is turned back.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_ext.routing.permutation import Permutation
from megatron_ext.transformer.kernels.torch_rows import by_slices, covers, gather, select, sum_rows
from megatron_ext.transformer.rotary import Rotary

FEW = 64
"""Rows: of so few, as in decoding, the number of operations counts and not what they move."""


def query_key_value_forward(
    mixed: Tensor, kv_only: Tensor | None, queries: Permutation | None, keys: Permutation | None, rotary: Rotary
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`~megatron_ext.transformer.kernels.functions.query_key_value`."""
    if kv_only is None and mixed.shape[0] <= FEW:
        return _of_few(mixed, queries, rotary)
    _, one, groups, width, d = mixed.shape
    cosine, sine = rotary.queries(mixed.dtype).unsqueeze(3)
    query = mixed.new_empty(cosine.shape[0], one, groups, width - 2, d)
    for at, rows in _in_order(queries, [mixed[..., :-2, :]]):
        _turn(rows, cosine[at], sine[at], query[at])
    cosine, sine = rotary.keys(mixed.dtype)
    key, value = (mixed.new_empty(cosine.shape[0], one, groups, d) for _ in range(2))
    pairs = [mixed[..., -2:, :]] if kv_only is None else [mixed[..., -2:, :], kv_only]
    for at, rows in _in_order(keys, pairs):
        _turn(rows[..., 0, :], cosine[at], sine[at], key[at])
        value[at].copy_(rows[..., 1, :])
    return query.flatten(2, 3), key, value


def query_key_value_backward(
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    queries: Permutation | None,
    keys: Permutation | None,
    rotary: Rotary,
    full_rows: int,
    kv_only_rows: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``mixed`` and ``kv_only``, of as many rows."""
    _, one, groups, d = of_key.shape
    of_query = of_query.unflatten(2, (groups, -1))
    complete = all(by is None or not by_slices(by, of_key) or covers(by) for by in (queries, keys))
    make = of_key.new_empty if complete else of_key.new_zeros
    of_mixed = make(full_rows, one, groups, of_query.shape[3] + 2, d)
    of_kv_only = None if kv_only_rows is None else make(kv_only_rows, one, groups, 2, d)
    angles = rotary.queries(of_key.dtype).unsqueeze(3)
    for rows, (cosine, sine), out in _in_place(queries, of_query, angles, [of_mixed[..., :-2, :]]):
        _turn(rows, cosine, -sine, out)
    angles = rotary.keys(of_key.dtype)
    targets = [of_mixed[..., -2:, :]] if of_kv_only is None else [of_mixed[..., -2:, :], of_kv_only]
    if keys is not None and keys.inverse is None:
        _repeated_keys_backward(of_key, of_value, keys, angles, targets)
        return of_mixed, of_kv_only
    for rows, (cosine, sine), out in _in_place(keys, of_key, angles, [x[..., 0, :] for x in targets]):
        _turn(rows, cosine, -sine, out)
    for rows, _, out in _in_place(keys, of_value, None, [x[..., 1, :] for x in targets]):
        out.copy_(rows)
    return of_mixed, of_kv_only


def _of_few(mixed: Tensor, by: Permutation | None, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of the same rows, turned at once."""
    mixed = mixed if by is None else gather(by, mixed)
    heads = mixed[..., :-1, :]
    cosine, sine = rotary.keys(mixed.dtype).unsqueeze(3)
    turned = _turn(heads, cosine, sine, mixed.new_empty(heads.shape))
    return turned[..., :-1, :].flatten(2, 3), turned[..., -1, :], mixed[..., -1, :]


def _in_order(by: Permutation | None, sources: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Where in the order of ``by`` which rows of the sources stand."""
    if by is None:
        yield slice(None), sources[0]
    elif not by_slices(by, sources[0]):
        yield slice(None), select(sources[0] if len(sources) == 1 else torch.cat(list(sources)), by.index)
    else:
        start = 0
        for source, first, n in by.runs:
            yield slice(start, start + n), sources[source][first : first + n]
            start += n


def _in_place(
    by: Permutation | None, rows: Tensor, angles: Tensor | None, targets: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Rows in the order of ``by``, their angles, and where in the targets they belong."""
    if by is None:
        yield rows, angles, targets[0]
    elif by_slices(by, rows):
        for at, target in _in_order(by, targets):
            yield rows[at], None if angles is None else angles[:, at], target
    else:
        sizes = [target.shape[0] for target in targets]
        pieces = select(rows, by.inverse).split(sizes)
        turned = [None] * len(sizes)
        if angles is not None:
            turned = select(angles.transpose(0, 1), by.inverse).transpose(0, 1).split(sizes, 1)
        yield from zip(pieces, turned, targets)


def _repeated_keys_backward(
    of_key: Tensor, of_value: Tensor, by: Permutation, angles: Tensor, targets: Sequence[Tensor]
) -> None:
    """Some rows are keys of several segments: their gradients are sums, in float32 at least and rounded once."""
    wide = torch.promote_types(of_key.dtype, torch.float32)
    cosine, sine = angles
    sizes = [target.shape[0] for target in targets]
    if by_slices(by, of_key):
        totals = [of_key.new_zeros(target.shape, dtype=wide) for target in targets]
        for at, total in _in_order(by, totals):
            total[..., 0, :].add_(_turn(of_key[at], cosine[at], -sine[at], torch.empty_like(of_key[at])))
            total[..., 1, :].add_(of_value[at])
    else:
        pairs = of_key.new_empty(*of_key.shape[:3], 2, of_key.shape[3])
        _turn(of_key, cosine, -sine, pairs[..., 0, :])
        pairs[..., 1, :].copy_(of_value)
        totals = sum_rows(by, pairs, sum(sizes)).split(sizes)
    for total, target in zip(totals, targets):
        target.copy_(total)


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> Tensor:
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cosine, out=out_a).addcmul_(b, sine, value=-1)
    torch.mul(b, cosine, out=out_b).addcmul_(a, sine)
    return out
