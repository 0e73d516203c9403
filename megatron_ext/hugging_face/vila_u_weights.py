"""Projector and depth head between this model's parameters and VILA-U's tensors.

::

    projector.linear_in, linear_out    mm_projector: layers.0, layers.2
    depth_head.code_linear             rqtransformer.in_mlp_1       from code vectors
    depth_head.hidden_linear           rqtransformer.in_mlp_2       from the language model's hidden states
    depth_head.positions.weight        rqtransformer.pos_emb_d      [1, D, E]
    depth_head.layers.N                rqtransformer.head_transformer.blocks.N
        attention_norm, mlp_norm           ln1, ln2
        qkv                                attn.query, attn.key, attn.value, here together, head by head
        proj                               attn.proj
        fc1, fc2                           mlp.0, mlp.2
    depth_head.norm, classifier        rqtransformer.classifier_mlp.layer_norm, linear
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_ext.hugging_face.tensor_files import TensorFiles
from megatron_ext.model_config import DepthHeadConfig, ModelConfig

HEAD = "rqtransformer."
_PROJECTOR = {"projector.linear_in": "layers.0", "projector.linear_out": "layers.2"}
_HEAD = {
    "depth_head.code_linear": "in_mlp_1",
    "depth_head.hidden_linear": "in_mlp_2",
    "depth_head.norm": "classifier_mlp.layer_norm",
    "depth_head.classifier": "classifier_mlp.linear",
}
_LAYER = {"attention_norm": "ln1", "mlp_norm": "ln2", "proj": "attn.proj", "fc1": "mlp.0", "fc2": "mlp.2"}
_QKV = ("attn.query", "attn.key", "attn.value")
_POSITIONS, _POSITIONS_THERE = "depth_head.positions.weight", f"{HEAD}pos_emb_d"
_LAYERS = re.compile(r"depth_head\.layers\.(\d+)\.(\w+)")


def tensor_shapes(model: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Name and shape of each tensor of the projector and of the depth head, by folder."""
    codes, h = model.image_codes, model.hidden_size
    e, width = codes.width, codes.head.hidden_size
    linear = {"layers.0": (h, e), "layers.2": (h, h)}
    head = {"in_mlp_1": (width, e), "in_mlp_2": (width, h)}
    head |= {"classifier_mlp.layer_norm": (width,), "classifier_mlp.linear": (codes.codebook_size, width)}
    for number in range(codes.head.num_layers):
        block = dict.fromkeys((*_QKV, "attn.proj"), (width, width)) | {"ln1": (width,), "ln2": (width,)}
        block |= {"mlp.0": (4 * width, width), "mlp.2": (width, 4 * width)}
        head |= {f"head_transformer.blocks.{number}.{name}": shape for name, shape in block.items()}
    return {
        "mm_projector": _with_biases(linear),
        "vision_tower": {HEAD + name: shape for name, shape in _with_biases(head).items()}
        | {_POSITIONS_THERE: (1, codes.depth, width)},
    }


def _with_biases(weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in weights.items()}


def read_parameter(files: Mapping[str, TensorFiles], head: DepthHeadConfig, name: str) -> Tensor | None:
    """A whole parameter of the projector or the depth head; None: it is of neither.

    Args:
        files: the tensors, by folder.
    """
    if name == _POSITIONS:
        return files["vision_tower"].rows(_POSITIONS_THERE)[0]
    folder, names = _tensors_of(name)
    parts = [files[folder].rows(stored) for stored in names]
    if len(parts) < 2:
        return parts[0] if parts else None
    return torch.stack([part.unflatten(0, (head.num_attention_heads, -1)) for part in parts], 1).flatten(0, 2)


def tensors(parameters: Mapping[str, Tensor], head: DepthHeadConfig) -> Iterator[tuple[str, str, Tensor]]:
    """(folder, name, tensor) of VILA-U for each whole parameter of the projector and the depth head; ``parameters`` are
    read when they are needed."""
    for name in parameters:
        if name == _POSITIONS:
            yield "vision_tower", _POSITIONS_THERE, parameters[name][None]
            continue
        folder, names = _tensors_of(name)
        if len(names) == 1:
            yield folder, names[0], parameters[name]
        elif names:
            heads = parameters[name].unflatten(0, (head.num_attention_heads, 3, -1))
            for stored, part in zip(names, heads.unbind(1)):
                yield folder, stored, part.flatten(0, 1)


def _tensors_of(name: str) -> tuple[str, list[str]]:
    """Folder and names of the tensors that a parameter consists of; none if it is of neither module."""
    module, _, kind = name.rpartition(".")
    if module in _PROJECTOR:
        return "mm_projector", [f"{_PROJECTOR[module]}.{kind}"]
    if module in _HEAD:
        return "vision_tower", [f"{HEAD}{_HEAD[module]}.{kind}"]
    if match := _LAYERS.fullmatch(module):
        there = _QKV if match[2] == "qkv" else [_LAYER[match[2]]]
        return "vision_tower", [f"{HEAD}head_transformer.blocks.{match[1]}.{part}.{kind}" for part in there]
    return "", []
