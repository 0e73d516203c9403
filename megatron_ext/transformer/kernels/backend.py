"""Which implementation of the kernels a device has."""

import functools
import importlib.util
import os
from types import ModuleType

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs its kernels on CPUs, one operation after the other: for tests."""


def backend_of(tensor: torch.Tensor) -> ModuleType:
    """The module whose functions compute where ``tensor`` is; ``meta`` takes the path of a GPU."""
    return _backend(tensor.device.type)


@functools.cache
def _backend(device: str) -> ModuleType:
    if (device != "cpu" or INTERPRETED) and importlib.util.find_spec("triton"):
        from megatron_ext.transformer.kernels import triton_backend

        return triton_backend
    from megatron_ext.transformer.kernels import torch_backend

    return torch_backend
