"""RMSNorm, alone and as the two norms of a layer."""

import torch
from torch import Tensor

from megatron_ext.transformer.kernels.functions import add_norm, input_norm, rms_norm


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, [..., h] to [..., h].

    Under sequence parallelism every rank sees only its share of the tokens: the weight is marked, so that Megatron-Core
    sums its gradients over the tensor-parallel group at the end of the step.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class InputNorm(RMSNorm):
    """The norm before attention."""

    def forward(self, full: Tensor, kv_only: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """FULL rows [n, 1, h] and KV_ONLY rows [m, 1, h] (or None) as they came, for the residual stream, then both
        normed; KV_ONLY ones without the weight, which is cheaper as a factor of the next matrix."""
        return input_norm(full, kv_only, self.weight, self.eps)


class AddNorm(RMSNorm):
    """The norm after attention."""

    def forward(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``residual + x``, [n, 1, h], and its norm."""
        return add_norm(residual, x, self.weight, self.eps)
