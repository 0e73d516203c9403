"""Initial weights that do not depend on the parallel layout.

Every rank samples each whole parameter from a generator seeded by (seed, global name) and keeps its tensor-parallel
slice, so the same seed starts the same model on 1 process and on 512. Weights are normal with ``init_std``; projections
that write into the residual stream, of the stack or of the depth head, have ``init_std / sqrt(2 * layers)`` (GPT-2,
section 2.3); positions of the depth head have 0.02; norms are ones, biases zeros. Buffers stay as they are.
"""

import hashlib
import math
import re

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

from megatron_ext.config import ModelConfig

_BLOCK = 1 << 20
"""Elements of a matrix that are drawn at once."""

# The dimension over which the tensor-parallel group cuts a projection or embedding: first those of the stack, then
# those of the depth head.
_CUTS = {
    "linear_qkv": 0,
    "linear_proj": 1,
    "linear_fc1": 0,
    "linear_fc2": 1,
    "word_embeddings": 0,
    "output_layer": 0,
    "hidden_linear": 0,
    "qkv": 0,
    "proj": 1,
    "fc1": 0,
    "fc2": 1,
    "classifier": 0,
}
_DEPTH_POSITIONS_STD = 0.02


@torch.no_grad()
def initialize(chunks: list[torch.nn.Module], model: ModelConfig, seed: int) -> None:
    """Set the weights of this rank's model chunks in place.

    Components of image tokens start at the weights of text: a separate matrix as a copy, a delta at zero (of low rank:
    ``down`` is random and ``up`` is zero).
    """
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            kind = name.split(".")[-1]
            _mark_as_cut(parameter, name)
            if parameter.dim() == 1 and kind != "bias":
                parameter.fill_(1.0)
                continue
            if kind.endswith(("bias", "_delta", "_up")):
                parameter.zero_()
                continue
            if kind.endswith("_weight"):
                name = name.removesuffix(kind) + "weight"
            _fill_random(parameter, name, _std(name, model), seed)


def _std(name: str, model: ModelConfig) -> float:
    module = name.split(".")[-2]
    if module == "positions":
        return _DEPTH_POSITIONS_STD
    if module in ("linear_proj", "linear_fc2"):
        return model.init_std / math.sqrt(2 * model.num_layers)
    if module in ("proj", "fc2"):
        return model.init_std / math.sqrt(2 * model.image_codes.head.num_layers)
    return model.init_std


def global_parameters(chunk: torch.nn.Module):
    """Yield the (name, parameter) pairs of one model chunk, with layers numbered from 0 over the whole model."""
    numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
    # A tied output weight on the last stage is the embedding under another name.
    tied = getattr(chunk, "share_embeddings_and_output_weights", False)
    for name, parameter in chunk.named_parameters():
        name = re.sub(r"^decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{numbers[int(m[1])]}", name)
        yield ("embedding.word_embeddings.weight" if tied and name == "output_layer.weight" else name), parameter


def cut(name: str) -> tuple[int | None, int]:
    """The dimension over which a parameter is cut (None: it is not), and the number of matrices stacked in it.

    2 matrices: gate and up of the FFN, of which every rank holds its share of both. The low-rank ``down`` of a
    projection is cut over the same dimension as the projection. A bias is cut where the outputs are.
    """
    module, kind = (["", *name.split(".")])[-2:]
    dim = _CUTS.get(module)
    if kind == "bias" and dim == 1:
        dim = None
    return dim, 2 if module == "linear_fc1" and not kind.endswith("_down") else 1


def full_shape(name: str, local: torch.Size) -> list[int]:
    """Shape of the whole parameter whose tensor-parallel slice has shape ``local``."""
    shape, (dim, _) = list(local), cut(name)
    if dim is not None:
        shape[dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return shape


def shard(whole: torch.Tensor, name: str) -> torch.Tensor:
    """This tensor-parallel rank's slice of a whole parameter."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    dim, matrices = cut(name)
    if dim is None:
        return whole
    return torch.cat([matrix.chunk(size, dim)[rank] for matrix in whole.chunk(matrices, dim)], dim)


def _mark_as_cut(parameter: torch.nn.Parameter, name: str) -> None:
    """Mark a cut parameter as Megatron-Core's own initialization would: the gradient norm counts parameters without
    these marks once per tensor-parallel group."""
    dim, matrices = cut(name)
    if dim is not None and not getattr(parameter, "tensor_model_parallel", False):
        set_tensor_model_parallel_attributes(parameter, True, dim, matrices)


def _fill_random(parameter: torch.Tensor, name: str, std: float, seed: int) -> None:
    """Fill with this tensor-parallel rank's slice of a random matrix, of which memory holds some rows at a time."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    rows, columns = full_shape(name, parameter.shape)
    for begin, end in _blocks(rows, columns):
        block = torch.empty(end - begin, columns, device="cpu").normal_(std=std, generator=generator)
        _copy_slice(parameter, name, block, begin, rows)


def _blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows with about :data:`_BLOCK` elements. torch draws normal numbers by 16s, and those at the end of a
    call anew, so ranges begin at multiples of 16 rows and the last one takes in what would be less than 16 rows: the
    numbers are those of a single call."""
    step = max(_BLOCK // columns // 16, 1) * 16
    edges = [*range(0, max(rows - 15, 1), step), rows]
    return list(zip(edges, edges[1:]))


def _copy_slice(parameter: torch.Tensor, name: str, block: torch.Tensor, begin: int, rows: int) -> None:
    """Copy what this tensor-parallel rank holds of the rows ``begin`` and on of a matrix of ``rows`` rows."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    dim, matrices = cut(name)
    if dim == 1:
        parameter[begin : begin + len(block)] = block.chunk(size, 1)[rank]
        return
    if dim is None:
        rank, size, matrices = 0, 1, 1
    share = rows // matrices // size
    for matrix in range(matrices):
        first = matrix * (rows // matrices) + rank * share  # of this rank's rows of the matrix
        low, high = max(first, begin), min(first + share, begin + len(block))
        if low < high:
            local = matrix * share + low - first
            parameter[local : local + high - low] = block[low - begin : high - begin]
