"""The steps in torch operators, with as few passes over memory as those allow. Norms of bf16 compute in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.transformer.kernels.cpu_head_norm import head_norm_backward, head_norm_forward
from megatron_ext.transformer.kernels.cpu_permutation import permute, unpermute
from megatron_ext.transformer.kernels.cpu_rotary import query_key_value_backward, query_key_value_forward

__all__ = [
    "head_norm_backward",
    "head_norm_forward",
    "permute",
    "query_key_value_backward",
    "query_key_value_forward",
    "unpermute",
]


def norm_forward(
    full: Tensor, kv_only: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """y = x s w of ``full`` and y = x s of ``kv_only``, where s = 1 / sqrt(mean(x^2) + eps) over the last dimension.

    Returns both y, then both s, [..., 1].
    """
    scale = _scale(full, eps)
    normed = (full * scale).mul_(weight).to(full.dtype)
    if kv_only is None:
        return normed, None, scale, None
    kv_only_scale = _scale(kv_only, eps)
    return normed, (kv_only * kv_only_scale).to(full.dtype), scale, kv_only_scale


def add_norm_forward(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``residual + x``, its norm and s of that norm."""
    total = residual + x
    normed, _, scale, _ = norm_forward(total, None, weight, eps)
    return total, normed, scale


def norm_backward(
    grad_normed: Tensor,
    grad_normed_kv_only: Tensor | None,
    grad_full: Tensor | None,
    grad_kv_only: Tensor | None,
    full: Tensor,
    normed_kv_only: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    kv_only_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of ``full``, ``kv_only`` and ``weight``; the first two include the incoming ``grad_full`` and
    ``grad_kv_only``::

    dx = s (g w) - x s^3 mean(g w x),   dw = sum over rows of g x s;     without w: dx = s (g - y mean(g y))
    """
    dtype, wide = full.dtype, scale.dtype
    g, x, w = (t.to(wide) for t in (grad_normed, full, weight))
    product = g * x
    grad_weight = (scale.flatten() @ product.flatten(0, -2)).to(dtype)
    share = (product @ w).unsqueeze(-1).mul_(scale.square() / -x.shape[-1])
    grad_full = _scaled_sum((g * w).addcmul_(x, share), scale, grad_full)
    if normed_kv_only is None:
        return grad_full.to(dtype), None, grad_weight
    g, y = grad_normed_kv_only.to(wide), normed_kv_only.to(wide)
    share = torch.linalg.vecdot(g, y).unsqueeze(-1).div_(-y.shape[-1])
    grad_kv_only = _scaled_sum(torch.addcmul(g, y, share), kv_only_scale, grad_kv_only)
    return grad_full.to(dtype), grad_kv_only.to(dtype), grad_weight


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 f], gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradients of gate and up, in one buffer."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(F.silu(gate), grad, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return out


def _scale(x: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _scaled_sum(x: Tensor, scale: Tensor, added: Tensor | None) -> Tensor:
    """``x * scale + added``."""
    return x.mul_(scale) if added is None else torch.addcmul(added.to(scale.dtype), x, scale)
