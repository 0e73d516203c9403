"""Rotary position embedding of queries and keys at given positions."""

import torch
from torch import Tensor


def rotary_table(inverse_frequencies: Tensor, positions: Tensor) -> Tensor:
    """Cosines and sines, [2, t, 1, 1, 1, d / 2], of positions [t], in the precision of the frequencies."""
    angles = torch.outer(positions.to(inverse_frequencies.dtype), inverse_frequencies)[:, None, None, None]
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """``x`` [t, 1, groups, heads, d] turned by the angles of ``table``; the pairs are the halves of d (GPT-NeoX)."""
    return _Rotation.apply(x, table)


class _Rotation(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin), one pass into one buffer; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor) -> Tensor:
        cosine, sine = table.to(x.dtype)
        ctx.save_for_backward(cosine, sine)
        return _rotate(x, cosine, sine)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        cosine, sine = ctx.saved_tensors
        return _rotate(gradient, cosine, -sine), None


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (a_, b_) = x.chunk(2, dim=-1), made.chunk(2, dim=-1)
    torch.mul(a, cosine, out=a_).addcmul_(b, sine, value=-1)
    torch.mul(b, cosine, out=b_).addcmul_(a, sine)
    return made
