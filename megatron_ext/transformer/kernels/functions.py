"""Autograd functions that the layers call, the same on every device.

Rows are [n, 1, ...]. The norms of a layer also return the hidden states that they norm, for the residual stream: so the
norm's backward pass adds that stream's gradient, instead of a pass of its own.
"""

import torch
from torch import Tensor

from megatron_ext.routing.permutation import Permutation
from megatron_ext.transformer.autograd_function import Function
from megatron_ext.transformer.kernels.backend import backend_of
from megatron_ext.transformer.rotary import RotaryAngles


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` [..., h] over its root mean square, times ``weight`` [h]."""
    return _Norm.call(x, None, weight, eps)[2]


def input_norm(
    full: Tensor, kv_only: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """``full`` [n, 1, h] and ``kv_only`` [m, 1, h], unchanged, then normed. The norm of ``kv_only`` leaves the weight
    to the next matrix."""
    return _Norm.call(full, kv_only, weight, eps)


def add_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual + x``, [n, 1, h], and the norm of this sum."""
    return _AddNorm.call(residual, x, weight, eps)


def head_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rows`` [n, 1, groups, w + 1, d], each group w queries and keys and a value: the value as it is, the others
    over their root mean square, times ``weight`` [w, d]."""
    return _HeadNorm.call(rows, weight, eps)


def query_key_value(
    mixed: Tensor, kv_only: Tensor | None, queries: Permutation | None, keys: Permutation | None, rotary: RotaryAngles
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated by their positions, and values, in attention's order.

    Args:
        mixed: [n, 1, groups, q + 2, d] of n FULL rows: each group has q queries, a key and a value.
        kv_only: [m, 1, groups, 2, d] of m KV_ONLY rows: a key and a value; None: no such rows.
        queries: permutation from the FULL rows to queries; None: the same order.
        keys: permutation from the n + m rows to keys and values; None: the order of the FULL rows.

    Returns:
        Queries [queries, 1, groups * q, d], keys and values [keys, 1, groups, d].
    """
    return _QueryKeyValue.call(mixed, kv_only, queries, keys, rotary)


def permute(permutation: Permutation | None, rows: Tensor) -> Tensor:
    """``rows`` [inputs, ...] in the order of ``permutation``, [outputs, ...]; None: unchanged."""
    return rows if permutation is None else _Permute.call(permutation, rows)


def unpermute(permutation: Permutation | None, rows: Tensor) -> Tensor:
    """The inverse of :func:`permute`: [outputs, ...] back to [inputs, ...]. Input rows without an output row are
    zeros."""
    return rows if permutation is None else _Unpermute.call(permutation, rows)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 f], gate first, to [..., f]."""
    return _SwiGLU.call(gate_up)


class _Norm(Function):
    """Saves the input of FULL rows, and the output of KV_ONLY rows, which the next product saves anyway."""

    @staticmethod
    def forward(ctx, full: Tensor, kv_only: Tensor | None, weight: Tensor, eps: float) -> tuple:
        rows, kv_only_rows = full.contiguous(), _contiguous(kv_only)
        normed, normed_kv_only, *scales = backend_of(full).norm_forward(rows, kv_only_rows, weight, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, normed_kv_only, weight, *scales)
        return full, kv_only, normed, normed_kv_only

    @staticmethod
    def backward(ctx, grad_full, grad_kv_only, grad_normed, grad_normed_kv_only) -> tuple:
        full, normed_kv_only, weight, *scales = ctx.saved_tensors
        grad_full, grad_kv_only, grad_weight = backend_of(full).norm_backward(
            _grad_or_zeros(grad_normed, full),
            None if normed_kv_only is None else _grad_or_zeros(grad_normed_kv_only, normed_kv_only),
            _contiguous(grad_full),
            _contiguous(grad_kv_only),
            full,
            normed_kv_only,
            weight,
            *scales,
        )
        return grad_full, grad_kv_only, grad_weight, None


class _AddNorm(Function):
    @staticmethod
    def forward(ctx, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed, scale = backend_of(x).add_norm_forward(residual.contiguous(), x.contiguous(), weight, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, scale)
        return total, normed

    @staticmethod
    def backward(ctx, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple:
        total, weight, scale = ctx.saved_tensors
        grad_total, _, grad_weight = backend_of(total).norm_backward(
            _grad_or_zeros(grad_normed, total), None, _contiguous(grad_total), None, total, None, weight, scale, None
        )
        return grad_total, grad_total, grad_weight, None


class _HeadNorm(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, weight = rows.contiguous(), weight.contiguous()
        normed, scale = backend_of(rows).head_norm_forward(rows, weight, eps)
        ctx.save_for_backward(rows, weight, scale)
        return normed

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return *backend_of(grad).head_norm_backward(grad.contiguous(), *ctx.saved_tensors), None


class _QueryKeyValue(Function):
    """Writes every row, and every gradient, once and in its final place. Saves no tensor."""

    @staticmethod
    def forward(ctx, mixed: Tensor, kv_only: Tensor | None, queries, keys, rotary: RotaryAngles) -> tuple:
        ctx.permutations, ctx.rotary = (queries, keys), rotary
        ctx.row_counts = mixed.shape[0], None if kv_only is None else kv_only.shape[0]
        return backend_of(mixed).query_key_value_forward(mixed, kv_only, queries, keys, rotary)

    @staticmethod
    def backward(ctx, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple:
        grads = (grad.contiguous() for grad in (grad_query, grad_key, grad_value))
        grad_mixed, grad_kv_only = backend_of(grad_query).query_key_value_backward(
            *grads, *ctx.permutations, ctx.rotary, *ctx.row_counts
        )
        return grad_mixed, grad_kv_only, None, None, None


class _Permute(Function):
    @staticmethod
    def forward(ctx, permutation: Permutation, rows: Tensor) -> Tensor:
        ctx.permutation, ctx.inputs = permutation, rows.shape[0]
        return backend_of(rows).permute(permutation, rows.contiguous())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, backend_of(grad).unpermute(ctx.permutation, grad.contiguous(), ctx.inputs)


class _Unpermute(Function):
    @staticmethod
    def forward(ctx, permutation: Permutation, rows: Tensor) -> Tensor:
        ctx.permutation = permutation
        return backend_of(rows).unpermute(permutation, rows.contiguous(), permutation.inverse.shape[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, backend_of(grad).permute(ctx.permutation, grad.contiguous())


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return backend_of(gate_up).swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return backend_of(gate_up).swiglu_backward(grad.contiguous(), gate_up)


def _grad_or_zeros(grad: Tensor | None, output: Tensor) -> Tensor:
    return torch.zeros_like(output) if grad is None else grad.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
