"""Groups of rows, each multiplied by its own matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.transformer.autograd_function import Function


def grouped_linear(rows: Tensor, counts: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """Consecutive groups of ``counts`` rows of [n, in], each times the transpose of its [out, in] matrix: [n, out]."""
    if len(weights) == 1:
        return torch.nn.functional.linear(rows, weights[0])
    return _GroupedLinear.call(rows, tuple(counts), *weights)


class _GroupedLinear(Function):
    """Every product is written into its part of the output, which saves a concatenation."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: tuple[int, ...], *weights: Tensor) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(rows, *weights)
        output = rows.new_empty(rows.shape[0], weights[0].shape[0])
        for x, y, weight in zip(rows.split(counts), output.split(counts), weights):
            torch.mm(x, weight.t(), out=y)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        rows, *weights = ctx.saved_tensors
        grads = grad.contiguous().split(ctx.counts)
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.empty_like(rows)
            for g, x, weight in zip(grads, grad_rows.split(ctx.counts), weights):
                torch.mm(g, weight, out=x)
        grad_weights = (
            g.t() @ x if needed else None
            for g, x, needed in zip(grads, rows.split(ctx.counts), ctx.needs_input_grad[2:])
        )
        return grad_rows, None, *grad_weights
