"""RMSNorm for the local (non Transformer Engine) implementation: Apex's kernel on GPUs that have it, else torch's."""

import torch

from megatron_ext import cpu


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
