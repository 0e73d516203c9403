"""Which backend computes on a device."""

import functools
import importlib.util
from types import ModuleType

import torch

from megatron_ext.transformer.kernels import INTERPRETED


def backend_of(tensor: torch.Tensor) -> ModuleType:
    """The backend for the device of ``tensor``; ``meta`` takes a GPU's. Without Triton all devices take the CPU's."""
    return _backend(tensor.device.type)


@functools.cache
def _backend(device: str) -> ModuleType:
    if (device != "cpu" or INTERPRETED) and importlib.util.find_spec("triton"):
        from megatron_ext.transformer.kernels import triton_backend

        return triton_backend
    from megatron_ext.transformer.kernels import cpu_backend

    return cpu_backend
