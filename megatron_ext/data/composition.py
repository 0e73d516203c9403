"""Which rows of a step each replica takes, and which of them share a micro-batch.

A step is ``rows_per_step`` rows, B, whatever the number of replicas D: replica i takes as many rows as lie between
floor(i B / D) and floor((i+1) B / D), in as many micro-batches as they need. Neither number must divide the other, so a
run may go on with more or fewer replicas at any step, over the same rows.

In order, replicas and micro-batches are contiguous. Balanced, they have equal work: rows are given out by falling cost,
each to the replica, then to the micro-batch, with the least work that has room; then the busiest exchanges a row with
another while that helps. Cheap micro-batches come first and last, where a pipeline fills and drains. Everything follows
from the costs of the rows, which are integers and never measured, so a run that resumes cuts its steps as before.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_ext.config import micro_batch_count
from megatron_ext.data.packed_rows import NO_ROW, PackedRows
from megatron_ext.data.row_contents import RowContents


@dataclass(frozen=True)
class Composition:
    """How steps are cut into micro-batches; the same for every step of a run, and pickles small.

    Attributes:
        micro_batch_size: most rows of a micro-batch.
        multiple: the number of a replica's micro-batches is a multiple of this.
        costs: from the contents of rows and the number of the step the cost of each row, int64 [rows]; None: rows stay
            in order.
    """

    micro_batch_size: int
    multiple: int = 1
    costs: Callable[[RowContents, int], np.ndarray] | None = None

    def row_numbers(self, rows: PackedRows, step: int, rows_per_step: int, replica: int, replicas: int) -> np.ndarray:
        """The numbers of a replica's rows, int64 [micro-batches * micro_batch_size], micro-batch after micro-batch;
        ``NO_ROW`` fills up."""
        first, shares = step * rows_per_step, shares_of(rows_per_step, replicas)
        if self.costs is None:
            start = first + sum(shares[:replica])
            numbers = np.arange(start, start + shares[replica])
            ends = np.cumsum([0, *shares_of(len(numbers), self.micro_batches(len(numbers)))])
            micro_batches = [numbers[begin:end] for begin, end in zip(ends, ends[1:])]
        else:
            costs = self.costs(rows.contents(first, first + rows_per_step), step)
            own = spread(costs, shares)[replica]
            bins = spread(costs[own], [self.micro_batch_size] * self.micro_batches(len(own)))
            order = rise_and_fall([costs[own[members]].sum() for members in bins])
            micro_batches = [first + own[bins[place]] for place in order]
        return np.concatenate([self._filled(numbers) for numbers in micro_batches])

    def micro_batches(self, rows: int) -> int:
        """The number of micro-batches of a replica with so many rows of each step."""
        return micro_batch_count(rows, self.micro_batch_size, self.multiple)

    def _filled(self, numbers: np.ndarray) -> np.ndarray:
        return np.pad(numbers, (0, self.micro_batch_size - len(numbers)), constant_values=NO_ROW)


def shares_of(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` parts as equal as integers allow: part i ends at floor((i+1) total / parts)."""
    ends = [number * total // parts for number in range(parts + 1)]
    return [end - start for start, end in zip(ends, ends[1:])]


def spread(costs: np.ndarray, room: list[int]) -> list[np.ndarray]:
    """Spread items over bins of equal work.

    Args:
        costs: int64 [items], at most as many items as there is room.
        room: most items of each bin.

    Returns:
        The items of each bin, int64, ascending.
    """
    bin_of, left = np.empty(len(costs), dtype=np.int64), list(room)
    open_bins = [(0, number) for number, size in enumerate(room) if size]  # (work, bin): a heap
    for item in np.argsort(-costs, kind="stable").tolist():
        work, number = open_bins[0]
        bin_of[item] = number
        left[number] -= 1
        if left[number]:
            heapq.heapreplace(open_bins, (work + int(costs[item]), number))
        else:
            heapq.heappop(open_bins)
    _exchange(costs, bin_of, len(room))
    return [np.flatnonzero(bin_of == number) for number in range(len(room))]


def _exchange(costs: np.ndarray, bin_of: np.ndarray, bins: int) -> None:
    """Exchange items of the busiest bin for items of others while its work falls; at most as often as there are bins.

    Args:
        bin_of: int64 [items], the bin of each item, which is changed.
    """
    work = np.zeros(bins, dtype=np.int64)
    np.add.at(work, bin_of, costs)
    for _ in range(bins):
        busiest = work.argmax()
        own = np.flatnonzero(bin_of == busiest)
        if not own.size:
            return  # nothing costs anything
        gain = costs[own][:, None] - costs
        after = np.maximum(work[busiest] - gain, work[bin_of] + gain)  # [own, items]
        after[:, own] = work[busiest]
        given, taken = np.unravel_index(after.argmin(), after.shape)
        if after[given, taken] >= work[busiest]:
            return
        other = bin_of[taken]
        work[busiest] -= gain[given, taken]
        work[other] += gain[given, taken]
        bin_of[own[given]], bin_of[taken] = other, busiest


def rise_and_fall(costs: list[int]) -> list[int]:
    """An order in which costs first rise and then fall: the cheapest items first and last."""
    rising = np.argsort(costs, kind="stable").tolist()
    return rising[::2] + rising[1::2][::-1]
