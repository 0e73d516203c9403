from transformer_engine.pytorch import distributed, ops
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast
from transformer_engine.pytorch.module import GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm


def is_fp8_available(return_reason: bool = False):
    return (True, "") if return_reason else True


is_mxfp8_available = is_fp8_available

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8_autocast",
    "is_fp8_available",
    "is_mxfp8_available",
    "ops",
]
