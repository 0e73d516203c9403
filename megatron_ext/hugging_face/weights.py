"""From a published model's tensors to this model's parameters, and back.

Megatron-Core stores query, key and value together, key/value group by key/value group, and gate and up of the FFN in
one matrix. In the order of groups a tensor-parallel rank's share is contiguous in every tensor of the published model,
so a rank reads nothing but its share::

    self_attention.linear_qkv.weight   rows of q_proj, k_proj, v_proj      mlp.linear_fc1.weight   rows of gate, up_proj
    self_attention.linear_qkv.bias     the same of their biases            mlp.linear_fc2.weight   columns of down_proj
    self_attention.linear_proj.weight  columns of o_proj                   norms                   whole
"""

import re

import torch
from torch import Tensor

from megatron_ext.hugging_face.folder import ModelFolder

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}


def read_parameter(source: ModelFolder, name: str, rank: int = 0, size: int = 1) -> Tensor | None:
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
    if inner in _WHOLE:
        return source.rows(prefix + _WHOLE[inner])
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
