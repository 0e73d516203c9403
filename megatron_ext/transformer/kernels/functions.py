"""The autograd functions that layers are made of, whatever computes them.

Rows are [n, 1, ...]. Where hidden states go on beside their norm, the function hands them on itself: so the gradient of
the residual stream is added inside the norm's backward pass and not in one of its own.
"""

import torch
from torch import Tensor

from megatron_ext.routing.permutation import Permutation
from megatron_ext.transformer.function import Function
from megatron_ext.transformer.kernels.backend import backend_of
from megatron_ext.transformer.rotary import Rotary


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` [..., h] over its root mean square, times ``weight`` [h]."""
    return _Norm.of(x, None, weight, eps)[2]


def input_norm(
    full: Tensor, kv_only: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Two kinds of rows [n, 1, h] and [m, 1, h] as they are, then normed: ``kv_only`` without the weight, as the next
    matrix takes it upon itself."""
    return _Norm.of(full, kv_only, weight, eps)


def add_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual + x``, [n, 1, h], and its norm."""
    return _AddNorm.of(residual, x, weight, eps)


def query_key_value(
    mixed: Tensor, kv_only: Tensor | None, queries: Permutation | None, keys: Permutation | None, rotary: Rotary
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, turned by their positions, and values, in attention's order.

    Args:
        mixed: of n FULL rows, [n, 1, groups, q + 2, d]: of each group q queries, a key and a value.
        kv_only: of m KV_ONLY rows, [m, 1, groups, 2, d]; None: no such rows.
        queries: order of queries; None: as the FULL rows stand.
        keys: order of keys and values, from the n + m rows; None: as the FULL rows stand.

    Returns:
        [queries, 1, groups * q, d], and twice [keys, 1, groups, d].
    """
    return _QueryKeyValue.of(mixed, kv_only, queries, keys, rotary)


def permute(by: Permutation | None, rows: Tensor) -> Tensor:
    """``rows`` [inputs, ...] as [outputs, ...] in the order of ``by``; None: as they are."""
    return rows if by is None else _Permute.of(by, rows)


def unpermute(by: Permutation | None, rows: Tensor) -> Tensor:
    """What :func:`permute` by the same map brought into order, [outputs, ...], back in its place,
    [inputs, ...]; rows that went nowhere are zeros."""
    return rows if by is None else _Unpermute.of(by, rows)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 f], gate first, to [..., f]."""
    return _SwiGLU.of(gate_up)


class _Norm(Function):
    """Keeps the rows with a weight, and of those without one what comes out: the next product keeps that anyway."""

    @staticmethod
    def forward(ctx, full: Tensor, kv_only: Tensor | None, weight: Tensor, eps: float) -> tuple:
        rows, kv_only_rows = full.contiguous(), _contiguous(kv_only)
        normed, normed_kv_only, *scales = backend_of(full).norm_forward(rows, kv_only_rows, weight, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, normed_kv_only, weight, *scales)
        return full, kv_only, normed, normed_kv_only

    @staticmethod
    def backward(ctx, of_full, of_kv_only, of_normed, of_normed_kv_only) -> tuple:
        full, normed_kv_only, weight, *scales = ctx.saved_tensors
        of_full, of_kv_only, of_weight = backend_of(full).norm_backward(
            _gradient(of_normed, full),
            None if normed_kv_only is None else _gradient(of_normed_kv_only, normed_kv_only),
            _contiguous(of_full),
            _contiguous(of_kv_only),
            full,
            normed_kv_only,
            weight,
            *scales,
        )
        return of_full, of_kv_only, of_weight, None


class _AddNorm(Function):
    @staticmethod
    def forward(ctx, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed, scale = backend_of(x).add_norm_forward(residual.contiguous(), x.contiguous(), weight, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, scale)
        return total, normed

    @staticmethod
    def backward(ctx, of_total: Tensor | None, of_normed: Tensor | None) -> tuple:
        total, weight, scale = ctx.saved_tensors
        of_total, _, of_weight = backend_of(total).norm_backward(
            _gradient(of_normed, total), None, _contiguous(of_total), None, total, None, weight, scale, None
        )
        return of_total, of_total, of_weight, None


class _QueryKeyValue(Function):
    """Every row is written once, where it belongs, and so is its gradient. Nothing is kept."""

    @staticmethod
    def forward(ctx, mixed: Tensor, kv_only: Tensor | None, queries, keys, rotary: Rotary) -> tuple:
        ctx.maps, ctx.rotary = (queries, keys), rotary
        ctx.rows = mixed.shape[0], None if kv_only is None else kv_only.shape[0]
        return backend_of(mixed).query_key_value_forward(mixed, kv_only, queries, keys, rotary)

    @staticmethod
    def backward(ctx, of_query: Tensor, of_key: Tensor, of_value: Tensor) -> tuple:
        gradients = (gradient.contiguous() for gradient in (of_query, of_key, of_value))
        of_mixed, of_kv_only = backend_of(of_query).query_key_value_backward(
            *gradients, *ctx.maps, ctx.rotary, *ctx.rows
        )
        return of_mixed, of_kv_only, None, None, None


class _Permute(Function):
    @staticmethod
    def forward(ctx, by: Permutation, rows: Tensor) -> Tensor:
        ctx.by, ctx.inputs = by, rows.shape[0]
        return backend_of(rows).gather(by, rows.contiguous())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, backend_of(gradient).gather_back(ctx.by, gradient.contiguous(), ctx.inputs)


class _Unpermute(Function):
    @staticmethod
    def forward(ctx, by: Permutation, rows: Tensor) -> Tensor:
        ctx.by = by
        return backend_of(rows).gather_back(by, rows.contiguous(), by.inverse.shape[0])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, backend_of(gradient).gather(ctx.by, gradient.contiguous())


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return backend_of(gate_up).swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return backend_of(gate_up).swiglu_backward(gradient.contiguous(), gate_up)


def _gradient(gradient: Tensor | None, of: Tensor) -> Tensor:
    return torch.zeros_like(of) if gradient is None else gradient.contiguous()


def _contiguous(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.contiguous()
