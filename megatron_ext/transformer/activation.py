"""SwiGLU, the gated activation of the FFN."""

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ext.transformer.kernels import functions


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 f], gate first, to [..., f] (Shazeer, arXiv 2002.05202): the definition of what
    :func:`~megatron_ext.transformer.kernels.functions.swiglu` computes."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLU(MegatronModule):
    """:func:`swiglu` of [n, 1, 2 f] to [n, 1, f]."""

    def forward(self, gate_up: Tensor) -> Tensor:
        return functions.swiglu(gate_up)
