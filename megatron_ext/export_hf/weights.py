"""This model's parameters under the names of Llama's kind of models, and of the components that image tokens have."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from megatron_ext.hugging_face.weights import EMBEDDING, HEAD, TABLES, WHOLE
from megatron_ext.model_config import ModelConfig
from megatron_ext.routing.plan import Projections

MODULES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "proj": ("self_attn.o_proj",),
    "fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "fc2": ("mlp.down_proj",),
}
"""The linear layers that each of this project's projections consists of."""

_PREFIXES = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}


def tensors(
    weights: Mapping[str, Tensor], model: ModelConfig, projections: Projections
) -> Iterator[tuple[str, Tensor]]:
    """The exported tensors one by one; ``weights`` are read when they are needed, a projection of a layer at a time.

    W + D is formed in the parameters' type, as generation forms it. A low-rank D stays two factors.
    """
    yield TABLES[EMBEDDING], weights[EMBEDDING]
    if model.max_image_tokens:
        yield "model.image_positions.weight", weights["image_positions.weight"]
    for number in range(model.num_layers):
        own, exported = f"decoder.layers.{number}.", f"model.layers.{number}."
        for name, target in WHOLE.items():
            if own + name in weights:
                yield exported + target, weights[own + name]
        for name, modules in MODULES.items():
            split = projections if name in projections.modules else Projections()
            for kind, tensor in _matrices(weights, own + _PREFIXES[name], split):
                # All linear layers of a projection have the same factor "down".
                shared = kind.endswith("down.weight")
                for module, part in zip(modules, [tensor] * len(modules) if shared else _parts(name, tensor, model)):
                    yield f"{exported}{module}.{kind}", part.contiguous()
    yield "model.norm.weight", weights["decoder.final_layernorm.weight"]
    if not model.tie_embeddings:
        yield TABLES[HEAD], weights[HEAD]


def _matrices(weights: Mapping[str, Tensor], prefix: str, split: Projections) -> Iterator[tuple[str, Tensor]]:
    """The matrices and the bias of one projection, under their exported names."""
    weight = weights[f"{prefix}.weight"]
    yield "weight", weight
    if f"{prefix}.bias" in weights:
        yield "bias", weights[f"{prefix}.bias"]
    for component in split.components:
        exported, own = f"components.{component}", f"{prefix}.{component}"
        if split.kind == "separate":
            yield f"{exported}.weight", weights[f"{own}_weight"]
        elif split.rank is None:
            yield f"{exported}.weight", weight + weights[f"{own}_delta"]
        else:
            yield f"{exported}.down.weight", weights[f"{own}_down"]
            yield f"{exported}.up.weight", weights[f"{own}_up"]


def _parts(name: str, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
    """The output rows [rows, ...] of a projection by linear layer: queries, keys and values are stored group by group,
    gate and up one after the other."""
    if name == "qkv":
        queries = model.num_attention_heads // model.num_query_groups
        groups = tensor.unflatten(0, (model.num_query_groups, queries + 2, model.head_size))
        return [part.flatten(0, 2) for part in groups.split((queries, 1, 1), 1)]
    return list(tensor.chunk(2)) if name == "fc1" else [tensor]
