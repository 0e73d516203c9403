"""RMSNorm of queries and keys over their heads in torch operators.

Rows are [n, 1, groups, w + 1, d]: in a group w queries and keys, which are normed, and a value, which is copied. So the
steps around need no copies.
"""

import torch
from torch import Tensor


def head_norm_forward(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x s weight [w, d] with s = 1 / sqrt(mean(x^2) + eps), and s, [n, 1, groups, w, 1], in float32 at least."""
    heads, normed = rows[..., :-1, :], torch.empty_like(rows)
    wide = torch.promote_types(rows.dtype, torch.float32)
    scale = torch.linalg.vector_norm(heads, dim=-1, keepdim=True, dtype=wide)
    scale.square_().div_(heads.shape[-1]).add_(eps).rsqrt_()
    torch.mul(heads * scale, weight, out=normed[..., :-1, :])
    normed[..., -1, :].copy_(rows[..., -1, :])
    return normed, scale


def head_norm_backward(grad: Tensor, rows: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``rows`` and ``weight``; with y = x s, without the weight::

    dx = s (g w - y mean(g w y)),   dw = sum over rows and groups of g y
    """
    grad_rows = torch.empty_like(rows)
    g, x = (heads[..., :-1, :].to(scale.dtype) for heads in (grad, rows))
    y, wide_weight = x * scale, weight.to(scale.dtype)
    product = g * y
    grad_weight = product.sum((0, 1, 2)).to(weight.dtype)
    share = product.mul_(wide_weight).mean(-1, keepdim=True)
    torch.mul(g, wide_weight, out=product).addcmul_(y, share, value=-1)
    torch.mul(product, scale, out=grad_rows[..., :-1, :])
    grad_rows[..., -1, :].copy_(grad[..., -1, :])
    return grad_rows, grad_weight
