"""RMSNorm for the local (non Transformer Engine) implementation: Apex's kernel on GPUs that have it, else torch's."""

import torch

from megatron_ext import cpu
from megatron_ext.transformer.function import Function


def _kernel() -> type[torch.nn.Module]:
    if not cpu.available():
        try:
            from apex.normalization import FusedRMSNorm

            return FusedRMSNorm
        except ImportError:
            pass
    return torch.nn.RMSNorm


class RMSNorm(_kernel()):
    """Root-mean-square norm over the last dimension, [..., h] to [..., h].

    Megatron-Core's own wrapper of the torch module refuses sequence parallelism. All that is needed is to mark the
    weight: every rank sees only its share of the tokens, so the weight's gradients are summed over the
    tensor-parallel group at the end of the step.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps)
        self.to(dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        return _RMSNorm.of(x, self.weight, self.eps) if plain else super().forward(x)


def unit_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """The same norm without a weight, for rows whose next matrix takes the weight upon itself."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return _UnitNorm.of(x, eps)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=eps)


def _scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, [..., 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _UnitNorm(Function):
    """y = x s with s = 1 / sqrt(mean(x^2) + eps): dx = s (g - y mean(g y))."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, eps: float) -> torch.Tensor:
        scale = _scale(x, eps)
        made = x * scale
        ctx.save_for_backward(made, scale)
        return made

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        made, scale = ctx.saved_tensors
        share = torch.linalg.vecdot(gradient, made).unsqueeze(-1).div_(-made.shape[-1])
        return torch.addcmul(gradient, made, share).mul_(scale), None


class _RMSNorm(Function):
    """y = x s w with s = 1 / sqrt(mean(x^2) + eps), in a quarter of the passes over memory that torch makes on CPUs.

    Keeps x alone: dx = s (g w) - x s^3 mean(g w x), dw = sum over rows of g x s.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        x, weight, scale = ctx.saved_tensors
        product = gradient * x
        of_weight = (scale.flatten() @ product.flatten(0, -2)).to(weight.dtype)
        share = (product @ weight).unsqueeze(-1).mul_(scale.square() / -x.shape[-1])
        return (gradient * weight).addcmul_(x, share).mul_(scale), of_weight, None
