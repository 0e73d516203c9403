"""The gated activation of the FFN."""

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ext.transformer.kernels.functions import swiglu


class SwiGLU(MegatronModule):
    """silu(gate) * up of [n, 1, 2 f] (gate first) to [n, 1, f] (Shazeer, arXiv 2002.05202)."""

    def forward(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up)
