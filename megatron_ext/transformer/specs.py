"""From our configuration to Megatron-Core's: the TransformerConfig and the module spec of a layer."""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_ext import compat, cpu
from megatron_ext.routing.plan import Projections
from megatron_ext.routing.roles import Role
from megatron_ext.transformer import fp8
from megatron_ext.transformer.activation import SwiGLU
from megatron_ext.transformer.attention import UnifiedSelfAttention
from megatron_ext.transformer.core_attention import DocumentAttention, transformer_engine_attention
from megatron_ext.transformer.layer import UnifiedLayer
from megatron_ext.transformer.linear import ColumnLinear, QueryKeyValueLinear, RowLinear, transformer_engine_linears
from megatron_ext.transformer.norm import STORED_NAMES, AddNorm, InputNorm, RMSNorm
from megatron_ext.transformer.resolved import ResolvedConfig


def transformer_config(resolved: ResolvedConfig) -> TransformerConfig:
    """Megatron-Core's configuration of the stack; see :mod:`megatron_ext.config` for what each key means."""
    config = resolved.config
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
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        # The modules come from the layer spec. A rank norms its own heads: with this switch Megatron-Core sums over the
        # tensor-parallel group the gradients of parameters with q_layernorm or k_layernorm in their names.
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        pipeline_model_parallel_layout=parallel.layout or None,
        # Without context_parallel_size, by which Transformer Engine would exchange keys; the rest asks parallel_state.
        sequence_parallel=parallel.sequence,
        # Batched sends and receives mix two neighbours up when both are the same rank (2 stages, interleaved).
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        # Only very old versions of torch need a synchronization after batched sends and receives. Outputs are never
        # deallocated (deallocate_pipeline_outputs): before megatron-core 0.18 interleaved sends still read them.
        batch_p2p_sync=False,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        # The weights are initialized afterwards, the same for every layout (see initialization.py).
        perform_initialization=False,
        # For the output layer, which is Megatron-Core's own and needs Apex for it; see fuses_weight_gradient.
        gradient_accumulation_fusion=apex_fuses_weight_gradients(),
        # The fused kernels give gradients in bf16, whatever the logits are, and choose their order of summation by
        # timing. Transformer Engine's fused loss is not an option: 2.12 subtracts 1 from a bf16 probability and waits
        # for the device in every backward pass, 2.20 refuses a micro-batch without loss tokens.
        cross_entropy_loss_fusion=bf16 and not on_cpu and not training.deterministic,
        deterministic_mode=training.deterministic,
        bias_activation_fusion=False,
        use_te_activation_func=True,  # that is: the activation module of the layer spec
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        **recompute,
        **fp8.settings(resolved.fp8),
    )


def apex_fuses_weight_gradients() -> bool:
    """Whether Apex's GEMM that adds a weight's gradient to the gradient buffer itself is there."""
    return not cpu.available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def fuses_weight_gradient(resolved: ResolvedConfig, name: str) -> bool:
    """Whether the GEMM of a weight's gradient adds to the gradient buffer itself, in the projections ``name`` (qkv,
    proj, fc1, fc2): by Transformer Engine, or by Apex.

    It does where W is used whole in every micro-batch. A gradient that comes the usual way would be left out of the
    buffer once another micro-batch has added to it: where W is a term of W + D, stands beside other matrices in a
    product, or gives keys and values alone.
    """
    plan = resolved.plan
    if plan.projections.components and name in plan.projections.modules:
        return False
    if name == "qkv" and any(Role.KV_ONLY in roles for roles in plan.roles):
        return False
    return resolved.implementation == "transformer_engine" or apex_fuses_weight_gradients()


def layer_spec(resolved: ResolvedConfig, passes_slices: bool = False) -> ModuleSpec:
    """One layer: :class:`UnifiedLayer` with split projections and attention of the chosen implementation."""
    if resolved.implementation == "transformer_engine":
        query_key_value, column, row = transformer_engine_linears()
        attention = transformer_engine_attention()
    else:
        attention = DocumentAttention
        query_key_value, column, row = QueryKeyValueLinear, ColumnLinear, RowLinear
    projections = resolved.plan.projections
    head_norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if resolved.config.model.qk_norm else {}

    def linear(kind: type, name: str) -> ModuleSpec:
        own = projections if name in projections.modules else Projections()
        fused = fuses_weight_gradient(resolved, name)
        return ModuleSpec(module=kind, params={"projections": own, "fuse_weight_gradient": fused})

    qkv = linear(query_key_value, "qkv")
    return ModuleSpec(
        module=UnifiedLayer,
        params={"passes_slices": passes_slices},
        submodules=TransformerLayerSubmodules(
            input_layernorm=InputNorm,
            self_attention=ModuleSpec(
                module=UnifiedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=partial(qkv.module, **qkv.params),
                    core_attention=attention,
                    linear_proj=linear(row, "proj"),
                    **head_norms,
                ),
            ),
            pre_mlp_layernorm=AddNorm,
            mlp=compat.mlp(
                MLPSubmodules(linear_fc1=linear(column, "fc1"), linear_fc2=linear(row, "fc2"), activation_func=SwiGLU)
            ),
            sharded_state_dict_keys_map=STORED_NAMES,
        ),
    )


def block_spec(
    resolved: ResolvedConfig, transformer: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage (and virtual stage) and the final norm."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    count = get_num_layers_to_build(transformer, vp_stage)
    inner = layer_spec(resolved, passes_slices=resolved.config.training.recompute != "full")
    return TransformerBlockSubmodules(layer_specs=[inner] * (count - 1) + [layer_spec(resolved)], layer_norm=RMSNorm)
