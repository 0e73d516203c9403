"""The gated activation of the FFN."""

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ext.transformer.function import Function


class SwiGLU(MegatronModule):
    """silu(gate) * up of [n, 1, 2 f] (gate first) to [n, 1, f] (Shazeer, arXiv 2002.05202).

    Megatron-Core's fused kernel on GPUs; it cannot be compiled on CPUs.
    """

    def forward(self, gate_up: Tensor) -> Tensor:
        return bias_swiglu_impl(gate_up, None) if gate_up.is_cuda else _SwiGLU.of(gate_up)


class _SwiGLU(Function):
    """Keeps its input alone for the backward pass, and writes both gradients into one buffer."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        made = torch.empty_like(gate_up)
        of_gate, of_up = made.chunk(2, dim=-1)
        torch.mul(F.silu(gate), gradient, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return made
