"""From our configuration to Megatron-Core's: the TransformerConfig and the module spec of a layer."""

import importlib.util

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext import cpu
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.transformer.activation import SwiGLU
from megatron_ext.transformer.attention import DocumentAttention, UnifiedSelfAttention, transformer_engine_attention
from megatron_ext.transformer.norm import RMSNorm


def implementation(config: Config) -> str:
    """``local`` or ``transformer_engine``, resolving ``auto``.

    Raises:
        UserError: Transformer Engine is asked for and cannot be had.
    """
    wanted = config.model.implementation
    possible = not cpu.available() and importlib.util.find_spec("transformer_engine") is not None
    if wanted == "transformer_engine" and not possible:
        raise UserError(
            "config: 'model.implementation' is transformer_engine, which needs a GPU and "
            "pip install 'transformer-engine[pytorch]'; 'local' works everywhere"
        )
    return ("transformer_engine" if possible else "local") if wanted == "auto" else wanted


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron-Core's configuration of the stack; see :mod:`megatron_ext.config` for what each key means."""
    model, parallel, training = config.model, config.parallel, config.training
    bf16, on_cpu = training.precision == "bf16", cpu.available()
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[training.recompute]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        sequence_parallel=parallel.sequence,
        # Batched sends and receives mix two neighbours up when both are the same rank (2 stages, interleaved).
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        # The weights are drawn afterwards, the same for every layout (see initialization.py).
        perform_initialization=False,
        # Fusions are compiled for GPUs; that of weight gradients is an extension of Apex.
        gradient_accumulation_fusion=not on_cpu
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        cross_entropy_loss_fusion=not on_cpu,
        bias_activation_fusion=not on_cpu,
        use_te_activation_func=on_cpu,  # that is: the activation module of the layer spec
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        **recompute,
    )


def layer_spec(config: Config) -> ModuleSpec:
    """One Transformer layer: Megatron-Core's, with attention inside documents."""
    if implementation(config) == "transformer_engine":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec()
        spec.submodules.self_attention.module = UnifiedSelfAttention
        spec.submodules.self_attention.submodules.core_attention = transformer_engine_attention()
        return spec
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if cpu.available():
        spec.submodules.mlp.submodules.activation_func = SwiGLU
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.module = UnifiedSelfAttention
    spec.submodules.self_attention.submodules.core_attention = DocumentAttention
    return spec


def block_spec(config: Config, transformer: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage (and virtual stage) and the final norm."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    count = get_num_layers_to_build(transformer, vp_stage)
    if implementation(config) == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm as norm
    else:
        norm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer_spec(config)] * count, layer_norm=norm)
