"""Groups of rows, a matrix for each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.transformer.function import Function


def grouped_linear(rows: Tensor, counts: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """Consecutive groups of ``counts`` rows of [n, in], each times the transpose of its [out, in] matrix: [n, out]."""
    if len(weights) == 1:
        return torch.nn.functional.linear(rows, weights[0])
    return _GroupedLinear.of(rows, tuple(counts), *weights)


class _GroupedLinear(Function):
    """Every product is written where it belongs: nothing is copied together afterwards."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: tuple[int, ...], *weights: Tensor) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(rows, *weights)
        made = rows.new_empty(rows.shape[0], weights[0].shape[0])
        for x, y, weight in zip(rows.split(counts), made.split(counts), weights):
            torch.mm(x, weight.t(), out=y)
        return made

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        rows, *weights = ctx.saved_tensors
        gradients = gradient.contiguous().split(ctx.counts)
        of_rows = None
        if ctx.needs_input_grad[0]:
            of_rows = torch.empty_like(rows)
            for g, x, weight in zip(gradients, of_rows.split(ctx.counts), weights):
                torch.mm(g, weight, out=x)
        of_weights = (
            g.t() @ x if wanted else None
            for g, x, wanted in zip(gradients, rows.split(ctx.counts), ctx.needs_input_grad[2:])
        )
        return of_rows, None, *of_weights
