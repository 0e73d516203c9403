"""Queries, keys and values in torch operators: permuted, rotated and split in as few passes as possible.

The rotation is :func:`~megatron_ext.transformer.rotary.apply_rotary`; gradients are rotated back.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_ext.routing.permutation import Permutation
from megatron_ext.transformer.kernels.cpu_permutation import by_slices, covers, permute, select, sum_rows
from megatron_ext.transformer.rotary import RotaryAngles

FEW = 64
"""Rows: of so few, as in decoding, the number of operations costs more than the memory that they move."""


def query_key_value_forward(
    mixed: Tensor, kv_only: Tensor | None, queries: Permutation | None, keys: Permutation | None, rotary: RotaryAngles
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`~megatron_ext.transformer.kernels.functions.query_key_value`."""
    if kv_only is None and mixed.shape[0] <= FEW:
        return _few_rows_forward(mixed, queries, rotary)
    _, batch, groups, width, d = mixed.shape
    cosine, sine = rotary.queries(mixed.dtype).unsqueeze(3)
    query = mixed.new_empty(cosine.shape[0], batch, groups, width - 2, d)
    for place, rows in _permuted_slices(queries, [mixed[..., :-2, :]]):
        _rotate(rows, cosine[place], sine[place], query[place])
    cosine, sine = rotary.keys(mixed.dtype)
    key, value = (mixed.new_empty(cosine.shape[0], batch, groups, d) for _ in range(2))
    pairs = [mixed[..., -2:, :]] if kv_only is None else [mixed[..., -2:, :], kv_only]
    for place, rows in _permuted_slices(keys, pairs):
        _rotate(rows[..., 0, :], cosine[place], sine[place], key[place])
        value[place].copy_(rows[..., 1, :])
    return query.flatten(2, 3), key, value


def query_key_value_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    queries: Permutation | None,
    keys: Permutation | None,
    rotary: RotaryAngles,
    full_rows: int,
    kv_only_rows: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``mixed`` and ``kv_only``, of ``full_rows`` and ``kv_only_rows`` rows."""
    _, batch, groups, d = grad_key.shape
    grad_query = grad_query.unflatten(2, (groups, -1))
    complete = all(p is None or not by_slices(p, grad_key) or covers(p) for p in (queries, keys))
    make = grad_key.new_empty if complete else grad_key.new_zeros
    grad_mixed = make(full_rows, batch, groups, grad_query.shape[3] + 2, d)
    grad_kv_only = None if kv_only_rows is None else make(kv_only_rows, batch, groups, 2, d)
    angles = rotary.queries(grad_key.dtype).unsqueeze(3)
    for rows, (cosine, sine), out in _unpermuted_slices(queries, grad_query, angles, [grad_mixed[..., :-2, :]]):
        _rotate(rows, cosine, -sine, out)
    angles = rotary.keys(grad_key.dtype)
    targets = [grad_mixed[..., -2:, :]] if grad_kv_only is None else [grad_mixed[..., -2:, :], grad_kv_only]
    if keys is not None and keys.inverse is None:
        _repeated_keys_backward(grad_key, grad_value, keys, angles, targets)
        return grad_mixed, grad_kv_only
    for rows, (cosine, sine), out in _unpermuted_slices(keys, grad_key, angles, [x[..., 0, :] for x in targets]):
        _rotate(rows, cosine, -sine, out)
    for rows, _, out in _unpermuted_slices(keys, grad_value, None, [x[..., 1, :] for x in targets]):
        out.copy_(rows)
    return grad_mixed, grad_kv_only


def _few_rows_forward(
    mixed: Tensor, permutation: Permutation | None, rotary: RotaryAngles
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of the same rows, rotated together."""
    mixed = mixed if permutation is None else permute(permutation, mixed)
    heads = mixed[..., :-1, :]
    cosine, sine = rotary.keys(mixed.dtype).unsqueeze(3)
    rotated = _rotate(heads, cosine, sine, mixed.new_empty(heads.shape))
    return rotated[..., :-1, :].flatten(2, 3), rotated[..., -1, :], mixed[..., -1, :]


def _permuted_slices(permutation: Permutation | None, sources: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``sources`` and the slice of the permuted rows that they fill."""
    if permutation is None:
        yield slice(None), sources[0]
    elif not by_slices(permutation, sources[0]):
        rows = sources[0] if len(sources) == 1 else torch.cat(list(sources))
        yield slice(None), select(rows, permutation.index)
    else:
        start = 0
        for source, first, n in permutation.runs:
            yield slice(start, start + n), sources[source][first : first + n]
            start += n


def _unpermuted_slices(
    permutation: Permutation | None, rows: Tensor, angles: Tensor | None, targets: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Permuted rows, their angles, and the rows of ``targets`` that they came from."""
    if permutation is None:
        yield rows, angles, targets[0]
    elif by_slices(permutation, rows):
        for place, target in _permuted_slices(permutation, targets):
            yield rows[place], None if angles is None else angles[:, place], target
    else:
        sizes = [target.shape[0] for target in targets]
        row_slices = select(rows, permutation.inverse).split(sizes)
        angle_slices = [None] * len(sizes)
        if angles is not None:
            angle_slices = select(angles.transpose(0, 1), permutation.inverse).transpose(0, 1).split(sizes, 1)
        yield from zip(row_slices, angle_slices, targets)


def _repeated_keys_backward(
    grad_key: Tensor, grad_value: Tensor, permutation: Permutation, angles: Tensor, targets: Sequence[Tensor]
) -> None:
    """Rows that are keys of several segments: their gradients are summed in float32 at least, and rounded once."""
    wide = torch.promote_types(grad_key.dtype, torch.float32)
    cosine, sine = angles
    sizes = [target.shape[0] for target in targets]
    if by_slices(permutation, grad_key):
        totals = [grad_key.new_zeros(target.shape, dtype=wide) for target in targets]
        for place, total in _permuted_slices(permutation, totals):
            key = grad_key[place]
            total[..., 0, :].add_(_rotate(key, cosine[place], -sine[place], torch.empty_like(key)))
            total[..., 1, :].add_(grad_value[place])
    else:
        pairs = grad_key.new_empty(*grad_key.shape[:3], 2, grad_key.shape[3])
        _rotate(grad_key, cosine, -sine, pairs[..., 0, :])
        pairs[..., 1, :].copy_(grad_value)
        totals = sum_rows(permutation, pairs, sum(sizes)).split(sizes)
    for total, target in zip(totals, targets):
        target.copy_(total)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> Tensor:
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cosine, out=out_a).addcmul_(b, sine, value=-1)
    torch.mul(b, cosine, out=out_b).addcmul_(a, sine)
    return out
