"""Initial weights that are sampled on the device of the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn

from megatron_ext.config import ModelConfig


@torch.no_grad()
def fill_on_device(chunks: list[nn.Module], model: ModelConfig, seed: int) -> None:
    """Fill matrices with normal numbers and norms with ones. Fast, but dependent on the device and the layout."""
    for chunk in chunks:
        parameters = list(chunk.parameters())
        generator = torch.Generator(parameters[0].device).manual_seed(seed)
        for parameter in parameters:
            if parameter.dim() > 1:
                parameter.normal_(std=model.init_std, generator=generator)
            else:
                parameter.fill_(1.0)


@contextmanager
def initialized_on_device() -> Iterator[None]:
    """Models built inside sample their weights on their device. A run samples them on the host, parameter by parameter,
    so that every layout starts alike; for a billion parameters that takes longer than timing a case."""
    with patch("megatron_ext.transformer.model.initialize", fill_on_device):
        yield
