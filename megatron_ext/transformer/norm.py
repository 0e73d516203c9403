"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467): the definition, and the modules of a layer's two norms."""

import torch
from torch import Tensor

from megatron_ext.transformer.kernels import functions


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x`` [..., h] / sqrt(mean(x^2) + eps) * ``weight`` [h], in float32 at least: the definition of what the norms of
    ``kernels/functions.py`` compute. None: no weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight).to(x.dtype)


class RMSNorm(torch.nn.Module):
    """:func:`rms_norm` of [..., h] over the last dimension.

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
        return functions.rms_norm(x, self.weight, self.eps)


STORED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""The names that Megatron-Core stores a layer's norms under, whatever its layers are made of."""


class InputNorm(RMSNorm):
    """The norm before attention."""

    def forward(self, full: Tensor, kv_only: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """FULL rows [n, 1, h] and KV_ONLY rows [m, 1, h] (or None), unchanged for the residual stream, then normed.

        The norm of KV_ONLY rows leaves the weight out: the key and value projection multiplies its matrix by the weight
        instead, which takes fewer operations.
        """
        return functions.input_norm(full, kv_only, self.weight, self.eps)


class AddNorm(RMSNorm):
    """The norm after attention."""

    def forward(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``residual + x``, [n, 1, h], and the norm of this sum."""
        return functions.add_norm(residual, x, self.weight, self.eps)
