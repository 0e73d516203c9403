"""Rotary position embedding (Su et al., arXiv 2104.09864), in the layout of GPT-NeoX."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ext.model_config import ModelConfig


def rotary_table(inverse_frequencies: Tensor, positions: int) -> Tensor:
    """Cosines and sines, [2, positions, d / 2], of positions from 0, in the precision of the frequencies [d / 2]."""
    position = torch.arange(positions, dtype=inverse_frequencies.dtype, device=inverse_frequencies.device)
    angles = torch.outer(position, inverse_frequencies)
    return torch.stack([angles.cos(), angles.sin()])


def scaled_frequencies(inverse_frequencies: Tensor, model: ModelConfig) -> Tensor:
    """Inverse frequencies [d / 2] as ``model`` scales them for long contexts: not at all, by linear interpolation, or
    as in Llama 3: ``apply_scaling`` in ``llama/model.py`` of meta-llama/llama-models, which is also
    ``rope_type: llama3`` of Hugging Face's ``modeling_rope_utils.py``. Megatron-Core's own has the factor alone."""
    if model.rotary_interpolation_factor != 1:
        return inverse_frequencies / model.rotary_interpolation_factor
    if (scaling := model.rotary_scaling) is None:
        return inverse_frequencies
    factor, low, high = scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / inverse_frequencies
    kept = (context / wavelengths - low) / (high - low)
    interpolated = (1 - kept) * inverse_frequencies / factor + kept * inverse_frequencies
    scaled = torch.where(wavelengths > context / low, inverse_frequencies / factor, interpolated)
    return torch.where(wavelengths < context / high, inverse_frequencies, scaled)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys [n, 1, heads, d] rotated by cosines and sines [2, n, 1, 1, d / 2].

    A position rotates the pairs (a, b) that the two halves of a head form: (a cos - b sin, b cos + a sin). This defines
    what :func:`~megatron_ext.transformer.kernels.functions.query_key_value` does to queries and keys.
    """
    cosine, sine = angles
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


@dataclass
class RotaryAngles:
    """The angles of one layer's queries and keys.

    Attributes:
        table: cosines and sines of all positions, [2, positions, d / 2].
        query_positions, key_positions: [queries] and [keys], in attention's order.
    """

    table: Tensor
    query_positions: Tensor
    key_positions: Tensor
    _looked_up: dict = field(default_factory=dict, repr=False)

    def queries(self, dtype: torch.dtype) -> Tensor:
        """Cosines and sines of the queries, [2, queries, 1, 1, d / 2], looked up on the first call."""
        return self._look_up(self.query_positions, dtype)

    def keys(self, dtype: torch.dtype) -> Tensor:
        """Cosines and sines of the keys, [2, keys, 1, 1, d / 2], looked up on the first call."""
        return self._look_up(self.key_positions, dtype)

    def _look_up(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        key = id(positions)  # queries and keys may share their positions
        if key not in self._looked_up:
            self._looked_up[key] = self.table.index_select(1, positions)[:, :, None, None].to(dtype)
        return self._looked_up[key]
