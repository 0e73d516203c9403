"""Which form a model can take in a Hugging Face folder, and its config.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ext.errors import UserError
from megatron_ext.export_hf.weights import MODULES
from megatron_ext.model_config import ModelConfig
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role, class_index
from megatron_ext.token_classes import Modality, Task
from megatron_ext.vocabulary import Vocabulary

STOCK_CLASSES = {
    (False, False): ("llama", "LlamaForCausalLM"),
    (True, False): ("qwen2", "Qwen2ForCausalLM"),
    (False, True): ("qwen3", "Qwen3ForCausalLM"),
}
"""``model_type`` and class by (qkv_bias, qk_norm)."""

OWN_CLASS = "UnifiedForConditionalGeneration"
_AUTO_MODELS = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
)


@dataclass(frozen=True)
class Exported:
    """What is exported.

    Attributes:
        plan: the roles of evaluation.
        vocab_size: rows of the embedding.
        dtype: as in ``torch.bfloat16``, without ``torch.``.
    """

    model: ModelConfig
    plan: Plan
    vocabulary: Vocabulary
    vocab_size: int
    dtype: str
    sequence_length: int


def why_not_stock(exported: Exported) -> str | None:
    """Why no class of transformers computes what the model does; None: one does."""
    model, plan = exported.model, exported.plan
    if any(role != "full" for layer in evaluation_roles(plan) for task in layer for role in task):
        return f"its plan ({plan.name}) has tokens that are not FULL"
    if plan.projections.components:
        return "image tokens have projections of their own (plan.projections)"
    if model.max_image_tokens:
        return "it has learned positions inside images (model.max_image_tokens)"
    if (model.qkv_bias, model.qk_norm) not in STOCK_CLASSES:
        return "no class has both model.qkv_bias and model.qk_norm"
    if STOCK_CLASSES[model.qkv_bias, model.qk_norm][0] == "llama" and model.hidden_size % model.num_attention_heads:
        return "Llama's class wants model.hidden_size divisible by model.num_attention_heads"
    return None


def choose_form(exported: Exported, form: Literal["auto", "plain", "own"]) -> Literal["plain", "own"]:
    """The form to write; auto: plain where possible.

    Raises:
        UserError: the model cannot take the plain form, or be exported at all.
    """
    share = exported.plan.dense_share
    if share is not None and share.evaluation not in (0, 1):
        raise UserError(
            f"'plan.dense_share.evaluation' is {share.evaluation:g}: an exported model selects no tokens at random; "
            "add plan.dense_share.evaluation=0 or =1"
        )
    reason = why_not_stock(exported)
    if form == "plain" and reason:
        raise UserError(f"--form plain: {reason}; take --form own")
    return "own" if form == "own" or (form == "auto" and reason) else "plain"


def plain_config(exported: Exported) -> dict:
    """config.json of a stock class."""
    model = exported.model
    model_type, class_name = STOCK_CLASSES[model.qkv_bias, model.qk_norm]
    config = {"architectures": [class_name], "model_type": model_type, **_llama_keys(exported)}
    # Read by transformers 4 and other engines.
    config["rope_theta"] = model.rotary_base
    scaling = config["rope_parameters"]
    config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    if model_type == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    else:
        config["use_sliding_window"] = False
    if model_type == "qwen3":
        config["attention_bias"] = False
    return config


def own_config(exported: Exported, vq: dict) -> dict:
    """config.json of the class in ``own_code/``; ``vq``: its keys about the VQ tokenizer."""
    model, vocabulary, projections = exported.model, exported.vocabulary, exported.plan.projections
    modules = [m.rpartition(".")[2] for name in MODULES if name in projections.modules for m in MODULES[name]]
    return {
        "architectures": [OWN_CLASS],
        "model_type": "unified_vlm",
        "auto_map": {"AutoConfig": "configuration_unified.UnifiedConfig"}
        | dict.fromkeys(_AUTO_MODELS, f"modeling_unified.{OWN_CLASS}"),
        **_llama_keys(exported),
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "roles": evaluation_roles(exported.plan),
        "projections": {
            "components": list(projections.components),
            "modules": modules if projections.components else [],
            "rank": projections.rank if projections.components else None,
        },
        "max_image_tokens": model.max_image_tokens,
        "text_size": vocabulary.text_size,
        "image_offset": vocabulary.image_offset,
        "codebook_size": vocabulary.codebook_size,
        "boi_token_id": vocabulary.boi,
        "eoi_token_id": vocabulary.eoi,
        "image_token_id": vocabulary.size,
        **vq,
    }


def evaluation_roles(plan: Plan) -> list[list[list[str]]]:
    """[layer][task][modality] names of roles in evaluation, where a dense share is nothing or all."""
    share, classes = plan.dense_share, len(Task) * len(Modality)

    def name(roles: Sequence[Role], task: Task, modality: Modality) -> str:
        dense = share is not None and share.evaluation and (share.of == "documents" or modality == Modality.IMAGE)
        return roles[class_index(task, modality) + (classes if dense else 0)].name.lower()

    return [[[name(roles, task, modality) for modality in Modality] for task in Task] for roles in plan.roles]


def _llama_keys(exported: Exported) -> dict:
    model, vocabulary = exported.model, exported.vocabulary
    return {
        "vocab_size": exported.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": _rope(model),
        "max_position_embeddings": exported.sequence_length,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "dtype": exported.dtype,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.ends,
        "pad_token_id": vocabulary.pad,
    }


def _rope(model: ModelConfig) -> dict:
    rope = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rotary_interpolation_factor != 1:
        rope |= {"rope_type": "linear", "factor": model.rotary_interpolation_factor}
    if (scaling := model.rotary_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return rope
