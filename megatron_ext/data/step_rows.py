"""The rows of each step for one replica."""

import numpy as np

from megatron_ext.data.composition import Composition, shares_of
from megatron_ext.data.packed_rows import PackedRows


class StepRows:
    """The rows of each step for one replica: ``step_rows[g]`` is what :meth:`PackedRows.gather` gives.

    Step g of the run is rows ``g * rows_per_step`` to ``(g + 1) * rows_per_step``, over all replicas.

    Args:
        composition: which rows the replica takes, and in which order; None: its share of the rows in order, without
            micro-batches to fill up.
    """

    def __init__(
        self,
        rows: PackedRows,
        rows_per_step: int,
        replica: int = 0,
        replicas: int = 1,
        composition: Composition | None = None,
    ):
        self.rows = rows
        self._place = rows_per_step, replica, replicas
        self._share = shares_of(rows_per_step, replicas)[replica]
        self._composition = composition or Composition(max(1, self._share))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens in each)."""
        composition = self._composition
        return composition.micro_batches(self._share) * composition.micro_batch_size, self.rows.length

    @property
    def depth(self) -> int:
        """Codes of an image token."""
        return self.rows.mixture.depth

    def __getitem__(self, step: int) -> np.ndarray:
        return self.rows.gather(self._composition.row_numbers(self.rows, step, *self._place))
