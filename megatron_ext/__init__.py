"""Unified vision-language training on Megatron-Core: text and VQ image tokens in one autoregressive Transformer."""

__version__ = "0.1.0"
