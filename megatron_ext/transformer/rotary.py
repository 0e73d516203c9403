"""Rotary position embedding: the angles of positions."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


def rotary_table(inverse_frequencies: Tensor, positions: int) -> Tensor:
    """Cosines and sines, [2, positions, d / 2], of positions from 0, in the precision of the frequencies [d / 2]."""
    places = torch.arange(positions, dtype=inverse_frequencies.dtype, device=inverse_frequencies.device)
    angles = torch.outer(places, inverse_frequencies)
    return torch.stack([angles.cos(), angles.sin()])


@dataclass
class Rotary:
    """The angles of one layer's queries and keys.

    Attributes:
        table: cosines and sines of all positions, [2, positions, d / 2].
        query_positions, key_positions: [queries] and [keys], in attention's order.
    """

    table: Tensor
    query_positions: Tensor
    key_positions: Tensor
    _rows: dict = field(default_factory=dict, repr=False)

    def queries(self, dtype: torch.dtype) -> Tensor:
        """Cosines and sines of the queries, [2, queries, 1, 1, d / 2]. Looked up once, by the first of the layers that
        share a route."""
        return self._of(self.query_positions, dtype)

    def keys(self, dtype: torch.dtype) -> Tensor:
        """The same of the keys, [2, keys, 1, 1, d / 2]."""
        return self._of(self.key_positions, dtype)

    def _of(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        if id(positions) not in self._rows:
            self._rows[id(positions)] = self.table.index_select(1, positions)[:, :, None, None].to(dtype)
        return self._rows[id(positions)]
