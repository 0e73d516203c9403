"""Hugging Face's Llama weights in this model's layout."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ext.config import ModelConfig


def from_llama(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The state of ``LlamaForCausalLM`` under this model's parameter names (local implementation, one process).

    Megatron-Core keeps query, key and value of one key/value group together, group after group, and gate and up
    of the FFN in one matrix.
    """
    made = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
    }
    if not model.tie_embeddings:
        made["output_layer.weight"] = weights["lm_head.weight"]
    for layer in range(model.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        groups = [
            weights[f"{theirs}self_attn.{name}_proj.weight"].view(model.num_query_groups, -1, model.hidden_size)
            for name in "qkv"
        ]
        made[f"{ours}self_attention.linear_qkv.weight"] = torch.cat(groups, dim=1).flatten(0, 1)
        made[f"{ours}self_attention.linear_proj.weight"] = weights[f"{theirs}self_attn.o_proj.weight"]
        gate_up = [weights[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        made[f"{ours}mlp.linear_fc1.weight"] = torch.cat(gate_up)
        made[f"{ours}mlp.linear_fc2.weight"] = weights[f"{theirs}mlp.down_proj.weight"]
        made[f"{ours}input_layernorm.weight"] = weights[f"{theirs}input_layernorm.weight"]
        made[f"{ours}pre_mlp_layernorm.weight"] = weights[f"{theirs}post_attention_layernorm.weight"]
    return made
