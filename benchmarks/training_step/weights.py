"""Initial weights that are drawn where the model is."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn

from megatron_ext.config import ModelConfig


@torch.no_grad()
def draw_on_device(chunks: list[nn.Module], model: ModelConfig, seed: int) -> None:
    """Normal matrices and norms of ones, in place. For speed alone: they depend on the device and on the layout."""
    for chunk in chunks:
        parameters = list(chunk.parameters())
        generator = torch.Generator(parameters[0].device).manual_seed(seed)
        for parameter in parameters:
            if parameter.dim() > 1:
                parameter.normal_(std=model.init_std, generator=generator)
            else:
                parameter.fill_(1.0)


@contextmanager
def drawn_on_device() -> Iterator[None]:
    """Models built inside draw their weights on their device. A run draws them on the host, parameter by parameter, so
    that every layout starts alike; for a billion of them that takes longer than all that a case is timed for."""
    with patch("megatron_ext.transformer.model.initialize", draw_on_device):
        yield
