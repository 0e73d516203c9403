"""Moving structures of integers and arrays to a device.

A structure is nested dataclasses, lists, tuples and dictionaries. Its arrays move to the device; everything else
(sizes, lists of lengths) stays on the host, which launches the kernels.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ext.data.serialization import ALIGNMENT


def to_device(value, device: torch.device):
    """The same structure with every array and host tensor as a tensor on ``device``; shared objects stay shared.

    All arrays move in one asynchronous copy from pinned memory.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _mapped(value, torch.as_tensor, {})
    places: dict[int, tuple[int, Tensor]] = {}
    size = 0

    def place(leaf):
        nonlocal size
        tensor = torch.as_tensor(leaf)
        if tensor.device.type != "cpu":
            return tensor.to(device, non_blocking=True)
        places[id(leaf)] = size, tensor
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        return leaf

    _mapped(value, place, {})
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, tensor in places.values():
        _view(pinned, start, tensor).copy_(tensor)
    moved = pinned.to(device, non_blocking=True)
    return _mapped(value, lambda leaf: _view(moved, *places[id(leaf)]) if id(leaf) in places else leaf, {})


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes of ``buffer`` from ``start`` on as a tensor with the shape and dtype of ``like``."""
    stop = start + like.numel() * like.element_size()
    return buffer[start:stop].view(like.dtype).view(like.shape)


def _mapped(value, convert: Callable, seen: dict):
    """``value`` with each of its arrays and tensors converted once."""
    if id(value) in seen:
        return seen[id(value)][1]
    if isinstance(value, np.ndarray | Tensor):
        result = convert(value)
    elif is_dataclass(value) and getattr(value, "on_host", False):
        result = _mapped_fields(value, torch.as_tensor, seen)
    elif is_dataclass(value):
        result = _mapped_fields(value, convert, seen)
    elif isinstance(value, list | tuple) and any(map(_may_hold_arrays, value)):
        result = type(value)(_mapped(v, convert, seen) for v in value)
    elif isinstance(value, dict):
        result = {key: _mapped(v, convert, seen) for key, v in value.items()}
    else:
        return value
    seen[id(value)] = value, result  # keeps the value alive, so that no other object gets its id
    return result


def _mapped_fields(value, convert: Callable, seen: dict):
    return type(value)(**{f.name: _mapped(getattr(value, f.name), convert, seen) for f in fields(value)})


def _may_hold_arrays(value) -> bool:
    return not isinstance(value, int | float | str)
