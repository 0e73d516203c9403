"""From a published model's tensors to this model's parameters, and back.

Megatron-Core stores query, key and value together, key/value group by key/value group, and gate and up of the FFN in
one matrix. In the order of groups a tensor-parallel rank's share is contiguous in every tensor of the published model,
so a rank reads nothing but its share::

    self_attention.linear_qkv.weight   rows of q_proj, k_proj, v_proj      mlp.linear_fc1.weight   rows of gate, up_proj
    self_attention.linear_qkv.bias     the same of their biases            mlp.linear_fc2.weight   columns of down_proj
    self_attention.linear_proj.weight  columns of o_proj                   norms                   whole
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_ext.model_config import ModelConfig

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
TABLES = {EMBEDDING: "model.embed_tokens.weight", HEAD: "lm_head.weight"}
"""Names of the tables of embedding and head, here and there."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
"""Names of a layer's norms, here and there."""


class Source(Protocol):
    """A published model's shape, and its tensors by name."""

    model: ModelConfig

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows of a tensor, or elements of a vector."""

    def columns(self, name: str, begin: int, end: int) -> Tensor:
        """Columns of a matrix."""


@dataclass(frozen=True)
class StateDict:
    """A :class:`Source` in memory."""

    tensors: Mapping[str, Tensor]
    model: ModelConfig

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        return self.tensors[name][begin:end]

    def columns(self, name: str, begin: int, end: int) -> Tensor:
        return self.tensors[name][:, begin:end]


def parameters_of(source: Source) -> dict[str, Tensor]:
    """All parameters of a model of one process with the published model's vocabulary."""
    inner = [f"self_attention.linear_{name}.weight" for name in ("qkv", "proj")]
    inner += [f"mlp.linear_{name}.weight" for name in ("fc1", "fc2")]
    inner += [name for name in WHOLE if source.model.qk_norm or "self_attention" not in name]
    inner += ["self_attention.linear_qkv.bias"] * source.model.qkv_bias
    names = [f"decoder.layers.{layer}.{name}" for layer in range(source.model.num_layers) for name in inner]
    parameters = {name: read_parameter(source, name) for name in [*names, "decoder.final_layernorm.weight"]}
    tables = dict(TABLES)
    if source.model.tie_embeddings:
        del tables[HEAD]
    return parameters | {name: source.rows(tensor) for name, tensor in tables.items()}


def read_parameter(source: Source, name: str, rank: int = 0, size: int = 1) -> Tensor | None:
    """Rank ``rank`` of ``size``'s slice of a parameter, other than embedding and head.

    A separate matrix of image tokens is W's copy. None: the published model has nothing for this parameter, which
    keeps its initial value (a delta, the positions inside an image).

    Args:
        name: the parameter's name, with layers numbered over the whole model.
    """
    if name == "decoder.final_layernorm.weight":
        return source.rows("model.norm.weight")
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    prefix, inner = f"model.layers.{match[1]}.", match[2]
    if inner in WHOLE:
        return source.rows(prefix + WHOLE[inner])
    module, kind = inner.rsplit(".", 1)
    if kind.endswith("_weight"):
        kind = "weight"
    if kind not in ("weight", "bias"):
        return None

    def share(tensor: str, rows: int) -> Tensor:
        return source.rows(f"{prefix}{tensor}.{kind}", rank * rows // size, (rank + 1) * rows // size)

    def column_share(tensor: str, columns: int) -> Tensor:
        return source.columns(f"{prefix}{tensor}.{kind}", rank * columns // size, (rank + 1) * columns // size)

    model = source.model
    queries, keys = (n * model.head_size for n in (model.num_attention_heads, model.num_query_groups))
    match module:
        case "self_attention.linear_qkv":
            parts = [share(f"self_attn.{x}_proj", queries if x == "q" else keys) for x in "qkv"]
            groups = model.num_query_groups // size
            return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
        case "self_attention.linear_proj":
            return column_share("self_attn.o_proj", queries)
        case "mlp.linear_fc1":
            return torch.cat([share(f"mlp.{x}_proj", model.ffn_hidden_size) for x in ("gate", "up")])
        case "mlp.linear_fc2":
            return column_share("mlp.down_proj", model.ffn_hidden_size)
    return None
