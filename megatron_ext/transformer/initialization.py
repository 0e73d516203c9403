"""Initial weights that do not depend on the parallel layout.

Every parameter is drawn whole from a generator seeded by (seed, global name) and each tensor-parallel rank keeps its
slice, so the same seed starts the same model on 1 process and on 512. Normal with ``init_std``; the projections that
write into the residual stream get ``init_std / sqrt(2 * layers)`` (GPT-2, section 2.3); norms are ones.
"""

import hashlib
import math
import re

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

from megatron_ext.config import ModelConfig

# Parameters cut over the tensor-parallel group: where, and in how many interleaved pieces (gate and up of SwiGLU).
_ROW_CUT = {"linear_proj.weight": 1, "linear_fc2.weight": 1}
_COLUMN_CUT = {
    "linear_qkv.weight": 1,
    "linear_fc1.weight": 2,
    "word_embeddings.weight": 1,
    "output_layer.weight": 1,
}


@torch.no_grad()
def initialize(chunks: list[torch.nn.Module], model: ModelConfig, seed: int) -> None:
    """Draw the weights of this rank's model chunks in place."""
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            tail = ".".join(name.split(".")[-2:])
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            _mark(parameter, tail)
            std = model.init_std / math.sqrt(2 * model.num_layers) if tail in _ROW_CUT else model.init_std
            parameter.copy_(shard(_draw(name, full_shape(tail, parameter.shape), std, seed), tail))


def global_parameters(chunk: torch.nn.Module):
    """(name, parameter) pairs of one model chunk, with layers numbered from 0 over the whole model."""
    numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
    # A tied output weight on the last stage is the embedding under another name.
    tied = getattr(chunk, "share_embeddings_and_output_weights", False)
    for name, parameter in chunk.named_parameters():
        name = re.sub(r"^decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{numbers[int(m[1])]}", name)
        yield ("embedding.word_embeddings.weight" if tied and name == "output_layer.weight" else name), parameter


def full_shape(tail: str, local: torch.Size) -> list[int]:
    """Shape of the whole parameter whose tensor-parallel slice has shape ``local``."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    shape = list(local)
    if tail in _COLUMN_CUT or tail in _ROW_CUT:
        shape[0 if tail in _COLUMN_CUT else 1] *= size
    return shape


def shard(whole: torch.Tensor, tail: str) -> torch.Tensor:
    """This tensor-parallel rank's slice of a whole parameter."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    if tail in _ROW_CUT:
        return whole.chunk(size, dim=1)[rank]
    if tail in _COLUMN_CUT:
        return torch.cat([piece.chunk(size)[rank] for piece in whole.chunk(_COLUMN_CUT[tail])])
    return whole


def _mark(parameter: torch.nn.Parameter, tail: str) -> None:
    """Say that a parameter is cut, as Megatron-Core's own initialisation would: the gradient norm counts a parameter
    without these marks once per tensor-parallel group."""
    for cuts, dim in ((_COLUMN_CUT, 0), (_ROW_CUT, 1)):
        if tail in cuts and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, True, dim, cuts[tail])


def _draw(name: str, shape: list[int], std: float, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape, device="cpu").normal_(std=std, generator=generator)
