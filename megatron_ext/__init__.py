"""Unified vision-language training on Megatron-Core: text and VQ image tokens in one autoregressive Transformer."""

from megatron_ext.transformer.transformer_engine import check_before_megatron

__version__ = "0.1.0"

check_before_megatron()
