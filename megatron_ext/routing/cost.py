"""What a micro-batch costs: FLOPs of the model itself, the numerator of the MFU.

Multiply-adds of a layer for one token, hidden size h, key/value width g, FFN width f (gated)::

    h*h (query) + 2*h*g (key, value) + h*h (output) + 3*h*f (FFN) + 2*h*(visible keys)

plus h*V for its logits. Two FLOPs each; the backward pass costs twice the forward pass. Recomputation is not work of
the model and is not counted.
"""

from collections.abc import Iterable

from megatron_ext.config import ModelConfig

TRAINING_PER_FORWARD = 3


def forward_flops(model: ModelConfig, vocab_size: int, lengths: Iterable[int]) -> int:
    """FLOPs of one forward pass over documents of these lengths (tokens)."""
    h = model.hidden_size
    per_token = model.num_layers * _projection_weights(model) + h * vocab_size
    total = 0
    for length in lengths:
        visible = length * (length + 1) // 2
        total += length * per_token + model.num_layers * 2 * h * visible
    return 2 * total


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the whole model, over all ranks."""
    h = model.hidden_size
    embeddings = (1 if model.tie_embeddings else 2) * vocab_size * h
    return embeddings + model.num_layers * (_projection_weights(model) + 2 * h) + h


def _projection_weights(model: ModelConfig) -> int:
    """Weights of one layer's projections, which are also its multiply-adds per token besides attention."""
    h, f = model.hidden_size, model.ffn_hidden_size
    g = h // model.num_attention_heads * model.num_query_groups
    return 2 * h * h + 2 * h * g + 3 * h * f
