"""Tiny models of transformers' own classes, with weights that leave no term of them invisible."""

from pathlib import Path

import torch

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
OTHER_EDGES = LLAMA3 | {"factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 6.0}
OTHER_EDGES["original_max_position_embeddings"] = 4096
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

FAMILIES = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "sliding_window": None},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": {"rope_theta": 1e6}},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
"""Shapes of models, by ``model_type``; the head sizes of Mistral and Qwen3 are not hidden_size / heads."""


def make_published(folder: Path, family: str = "llama", rows: int = 40, dtype: torch.dtype = torch.float32, **settings):
    """Save a model of two layers in several shards, and return it.

    Args:
        rows: of its embedding.
        settings: of its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 16384}
    config = AutoConfig.for_model(family, **(shape | FAMILIES[family] | settings), vocab_size=rows)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        std = 0.3 if "embed" in name else 0.05 if "head" in name else 0.1
        parameter.data.copy_(
            0.5 * noise if "bias" in name else 1 + 0.2 * noise if parameter.dim() == 1 else std * noise
        )
    model.save_pretrained(folder, max_shard_size="60KB")
    return model.eval()
