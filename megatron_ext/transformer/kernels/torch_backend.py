"""The steps in plain torch, for CPUs above all: as few passes over memory as torch's operations allow.

bf16 is normed in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.transformer.kernels.torch_rotary import query_key_value_backward, query_key_value_forward
from megatron_ext.transformer.kernels.torch_rows import gather, gather_back

__all__ = ["gather", "gather_back", "query_key_value_backward", "query_key_value_forward"]


def norm_forward(
    full: Tensor, kv_only: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """y = x s w with s = 1 / sqrt(mean(x^2) + eps) over the last dimension; without w for ``kv_only``. Both y, then
    both s, [..., 1]."""
    scale = _scale(full, eps)
    normed = (full * scale).mul_(weight).to(full.dtype)
    if kv_only is None:
        return normed, None, scale, None
    kv_only_scale = _scale(kv_only, eps)
    return normed, (kv_only * kv_only_scale).to(full.dtype), scale, kv_only_scale


def add_norm_forward(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its norm and s."""
    total = residual + x
    normed, _, scale, _ = norm_forward(total, None, weight, eps)
    return total, normed, scale


def norm_backward(
    of_normed: Tensor,
    of_normed_kv_only: Tensor | None,
    of_full: Tensor | None,
    of_kv_only: Tensor | None,
    full: Tensor,
    normed_kv_only: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    kv_only_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of ``full``, ``kv_only`` and ``weight``; ``of_full`` and ``of_kv_only`` are added to theirs::

    dx = s (g w) - x s^3 mean(g w x),   dw = sum over rows of g x s;     without w: dx = s (g - y mean(g y))
    """
    dtype, wide = full.dtype, scale.dtype
    g, x, w = (t.to(wide) for t in (of_normed, full, weight))
    product = g * x
    of_weight = (scale.flatten() @ product.flatten(0, -2)).to(dtype)
    share = (product @ w).unsqueeze(-1).mul_(scale.square() / -x.shape[-1])
    of_full = _scaled((g * w).addcmul_(x, share), scale, of_full)
    if normed_kv_only is None:
        return of_full.to(dtype), None, of_weight
    g, y = of_normed_kv_only.to(wide), normed_kv_only.to(wide)
    share = torch.linalg.vecdot(g, y).unsqueeze(-1).div_(-y.shape[-1])
    of_kv_only = _scaled(torch.addcmul(g, y, share), kv_only_scale, of_kv_only)
    return of_full.to(dtype), of_kv_only.to(dtype), of_weight


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """silu(gate) * up"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """Both gradients in one buffer."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up)
    of_gate, of_up = out.chunk(2, dim=-1)
    torch.mul(F.silu(gate), gradient, out=of_up)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
    return out


def _scale(x: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _scaled(x: Tensor, scale: Tensor, added: Tensor | None) -> Tensor:
    return x.mul_(scale) if added is None else torch.addcmul(added.to(scale.dtype), x, scale)
