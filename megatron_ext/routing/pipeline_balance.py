"""Choosing how many layers each pipeline stage holds, from what the layers cost.

The costs are seconds, FLOPs or any unit of time, of several micro-batches: under token reduction the layers of one
model cost differently, and so do the micro-batches, and what a stage waits for depends on both. The choice is a pure
function of its arguments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from megatron_ext.routing.pipeline import Simulation, simulate
from megatron_ext.routing.pipeline_layout import even_counts

Fits = Callable[[int, list[range]], bool]
"""Whether a rank can hold layers: its number, and the numbers of the layers of each of its chunks."""


@dataclass(frozen=True)
class ModelCosts:
    """Seconds of a forward pass through the parts of a model.

    Attributes:
        layers: [layer][micro-batch].
        first: [micro-batch], of what comes before the layers, on the first stage.
        last: [micro-batch], of what comes after them, on the last one.
    """

    layers: Sequence[Sequence[float]]
    first: Sequence[float]
    last: Sequence[float]
    _sums: list[list[float]] = field(init=False, repr=False, compare=False)
    totals: list[float] = field(init=False, repr=False, compare=False)
    """[L + 1]: of the first n layers, over all micro-batches."""

    def __post_init__(self):
        sums = [[0.0, *accumulate(layers)] for layers in zip(*self.layers)]  # [micro-batch][first n layers]
        object.__setattr__(self, "_sums", sums)
        object.__setattr__(self, "totals", [0.0, *accumulate(map(sum, self.layers))])

    def of_chunks(self, counts: Sequence[int]) -> list[list[float]]:
        """Costs [chunk][micro-batch] of chunks with so many layers."""
        ends = list(accumulate(counts))
        chunks = [[sums[end] - sums[end - n] for sums in self._sums] for end, n in zip(ends, counts)]
        chunks[0] = [cost + first for cost, first in zip(chunks[0], self.first)]
        chunks[-1] = [cost + last for cost, last in zip(chunks[-1], self.last)]
        return chunks

    def simulate(self, counts: Sequence[int], pipeline: int, backward: float = 2, latency: float = 0.0) -> Simulation:
        """A step of the pipeline with so many layers in each chunk; a backward pass costs ``backward`` forward ones."""
        forward = self.of_chunks(counts)
        behind = [[backward * cost for cost in chunk] for chunk in forward]
        return simulate(forward, pipeline, len(counts) // pipeline, behind, latency)

    def busiest(self, counts: Sequence[int], pipeline: int, backward: float = 2) -> float:
        """Seconds of work, forward and backward, of the rank with most of it."""
        ends = list(accumulate(counts))
        chunks = [self.totals[end] - self.totals[end - n] for end, n in zip(ends, counts)]
        chunks[0] += sum(self.first)
        chunks[-1] += sum(self.last)
        return (1 + backward) * max(sum(chunks[rank::pipeline]) for rank in range(pipeline))


def balance(
    costs: ModelCosts, pipeline: int, virtual: int = 1, fits: Fits | None = None, backward: float = 2
) -> list[int] | None:
    """Layers of each chunk such that a step is short.

    With one chunk per rank: the contiguous partition whose most costly stage is cheapest, found exactly; among these
    the one with fewest layers on stage 0, which keeps the activations of most micro-batches, and so on along the
    stages. With several: the best that moving layers between chunks finds by simulation.

    Args:
        costs: of the micro-batches to simulate; with one chunk per rank only their sums matter.
        fits: a limit of memory.
        backward: as for :meth:`ModelCosts.simulate`.

    Returns:
        None if there are fewer layers than chunks, or nothing fits.
    """
    chunks = pipeline * virtual
    if len(costs.layers) < chunks:
        return None
    if virtual == 1:
        return _partition(costs, chunks, fits)
    starts = [even_counts(len(costs.layers), chunks), _partition(costs, chunks, None)]
    unfit, _, counts = min(_descend(costs, pipeline, start, fits, backward) for start in starts)
    return None if unfit else counts


def _partition(costs: ModelCosts, stages: int, fits: Fits | None) -> list[int] | None:
    """The contiguous partition with the cheapest most costly stage, by dynamic programming from the last stage."""
    num_layers = len(costs.layers)
    ends = [0.0] * stages
    ends[0] += sum(costs.first)
    ends[-1] += sum(costs.last)

    def stage(number: int, start: int, stop: int) -> float:
        return costs.totals[stop] - costs.totals[start] + ends[number]

    def allowed(number: int, start: int, stop: int) -> bool:
        return fits is None or fits(number, [range(start, stop)])

    infinite = float("inf")
    # best[n][i]: the cost of the most costly of the stages from n on, which hold the layers from i on.
    best = [[infinite] * (num_layers + 1) for _ in range(stages)] + [[infinite] * num_layers + [0.0]]
    for number in reversed(range(stages)):
        for start in range(number, num_layers - (stages - number) + 1):
            for stop in range(start + 1, num_layers + 1):
                cost = max(stage(number, start, stop), best[number + 1][stop])
                if cost < best[number][start] and allowed(number, start, stop):
                    best[number][start] = cost
    if best[0][0] == infinite:
        return None
    counts, start = [], 0
    for number in range(stages):
        stop = start + 1
        while max(stage(number, start, stop), best[number + 1][stop]) > best[number][start] or not allowed(
            number, start, stop
        ):
            stop += 1
        counts.append(stop - start)
        start = stop
    return counts


def _descend(
    costs: ModelCosts, pipeline: int, counts: list[int], fits: Fits | None, backward: float
) -> tuple[int, float, list[int]]:
    """Move one layer at a time from a chunk to one of the P before or after it while fewer ranks are over the limit of
    memory, or the simulated step becomes shorter.

    Returns:
        The ranks over the limit, the seconds of the step, and the layers of each chunk.
    """
    best, moved = (_unfit(counts, pipeline, fits), costs.simulate(counts, pipeline, backward).makespan), True
    while moved:
        moved = False
        for source in range(len(counts)):
            # Farther moves find little more: at P chunks' distance is the same rank's next chunk.
            for target in range(max(0, source - pipeline), min(len(counts), source + pipeline + 1)):
                if source == target or counts[source] == 1:
                    continue
                other = list(counts)
                other[source] -= 1
                other[target] += 1
                unfit = _unfit(other, pipeline, fits)
                # No step is shorter than the work of its busiest rank, which takes less time to compute.
                if (unfit, costs.busiest(other, pipeline, backward)) >= best:
                    continue
                makespan = costs.simulate(other, pipeline, backward).makespan
                if (unfit, makespan) < (best[0], best[1] * (1 - 1e-9)):
                    best, counts, moved = (unfit, makespan), other, True
    return *best, counts


def _unfit(counts: Sequence[int], pipeline: int, fits: Fits | None) -> int:
    """The number of ranks that cannot hold their layers."""
    if fits is None:
        return 0
    ends = list(accumulate(counts))
    ranges = [range(end - n, end) for end, n in zip(ends, counts)]
    return sum(not fits(rank, ranges[rank::pipeline]) for rank in range(pipeline))
