"""Keys of overlapping segments for kernels that want each segment's own.

The segments of a document share its keys. A variable-length kernel could read shared keys forward, given the rows at
which segments begin, but backward it stores the gradient of a key for every segment without adding them up. So keys
are repeated for the call, [sum of the segments' keys], and repeated again in the backward pass: only the keys
themselves are kept, and a document's memory does not grow with the square of its segments.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ext.routing.permutation import Permutation
from megatron_ext.transformer.kernels.functions import permute


def with_segment_keys(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_keys: Permutation | None,
) -> Tensor:
    """``attend(query, key, value)`` with keys and values [keys, ...] as ``segment_keys`` repeats them; None: as they
    are."""
    if segment_keys is None:
        return attend(query, key, value)
    once = [key.detach(), value.detach()]
    repeated = [permute(segment_keys, x) for x in (key, value)]
    numbers = {x.untyped_storage().data_ptr(): i for i, x in enumerate(repeated)}

    def pack(tensor: Tensor) -> Tensor | tuple:
        number = numbers.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        layout = tensor.shape, tensor.stride(), tensor.storage_offset()
        return tensor if number is None else (number, layout)

    def unpack(packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        number, layout = packed
        return permute(segment_keys, once[number]).as_strided(*layout)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return attend(query, *repeated)
