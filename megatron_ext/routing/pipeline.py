"""Pipeline schedules of Megatron-Core, and how long they take, simulated from the seconds of each part of the model.

The model is cut into P * V chunks for P ranks with V chunks each; chunk c is on rank c mod P, so that a rank's chunk
number v is chunk v * P + rank of the model. A rank works off its tasks in a fixed order (:func:`order`), the same as
``get_forward_backward_func`` of megatron-core 0.16.1 to 0.19: 1F1B, or the interleaved schedule with V > 1. A task
starts when its rank is free and the message that it needs is there.

With equal costs a step takes 1 + (P - 1) / (M V) of its work, M micro-batches: the pipeline's bubble.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Task(NamedTuple):
    """A forward or backward pass of one micro-batch through one of a rank's chunks.

    Attributes:
        chunk: number of the chunk on its rank, from 0.
        micro_batch: number of the micro-batch, from 0.
    """

    is_forward: bool
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Simulation:
    """A simulated step.

    Attributes:
        makespan: seconds from the first task's start to the last one's end.
        busy: seconds of work of each rank.
        idle: seconds of the makespan in which each rank waits.
        peak_alive: for each rank, the micro-batches of each of its chunks that have gone forward and not yet backward,
            at the first moment when they are most in all.
    """

    makespan: float
    busy: list[float]
    idle: list[float]
    peak_alive: list[list[int]]

    @property
    def over_ideal(self) -> float:
        """The makespan over that of the same work without waiting, shared equally by the ranks."""
        return self.makespan * len(self.busy) / sum(self.busy)


def group_size(micro_batches: int, pipeline: int) -> int:
    """Megatron-Core's ``microbatch_group_size_per_vp_stage`` q for the interleaved schedule: a rank takes q
    micro-batches through a chunk before it goes to the next chunk.

    The schedule refuses q < P, q > M, and a last group of fewer than P micro-batches. The smallest q that it takes is
    best, since every rank keeps (V - 1) q micro-batches more: P itself where M is a multiple of P.

    Raises:
        ValueError: M < P, for which there is none.
    """
    for size in range(pipeline, micro_batches + 1):
        if micro_batches % size == 0 or micro_batches % size >= pipeline:
            return size
    raise ValueError(f"{micro_batches} micro-batches do not fill an interleaved pipeline of {pipeline} stages")


def order(rank: int, pipeline: int, virtual: int, micro_batches: int, group: int | None = None) -> list[Task]:
    """The tasks of a rank, in the order of Megatron-Core's schedule.

    Args:
        rank: the rank in its pipeline, from 0.
        group: micro-batches that go through a chunk in a row; None: that of :func:`group_size`. Ignored with V = 1.
    """
    if virtual == 1 or pipeline == 1:
        table = [(0, m) for m in range(micro_batches)]
        warm_up = pipeline - rank - 1
    else:
        group = group or group_size(micro_batches, pipeline)
        table = [
            (chunk, m)
            for first in range(0, micro_batches, group)
            for chunk in range(virtual)
            for m in range(first, min(first + group, micro_batches))
        ]
        warm_up = 2 * (pipeline - rank - 1) + (virtual - 1) * group
    warm_up = min(warm_up, len(table))
    forward = [Task(True, chunk, m) for chunk, m in table]
    backward = [Task(False, virtual - 1 - chunk, m) for chunk, m in table]
    steady = [task for pair in zip(forward[warm_up:], backward) for task in pair]
    return forward[:warm_up] + steady + backward[len(table) - warm_up :]


def peak(tasks: Sequence[Task], sizes: Sequence[float]) -> float:
    """The most that a rank keeps between forward and backward passes, over its tasks in order.

    Args:
        sizes: what one micro-batch keeps in each of the rank's chunks, such as bytes.
    """
    kept = most = 0.0
    for task in tasks:
        kept += sizes[task.chunk] if task.is_forward else -sizes[task.chunk]
        most = max(most, kept)
    return most


def simulate(
    forward: Sequence[Sequence[float]],
    pipeline: int,
    virtual: int = 1,
    backward: Sequence[Sequence[float]] | None = None,
    latency: float = 0.0,
    group: int | None = None,
) -> Simulation:
    """Simulate one step.

    Args:
        forward: seconds (or any unit) of the forward pass, [P * V chunks of the model][M micro-batches].
        backward: the same of the backward pass; None: twice the forward pass.
        latency: of a message between two ranks.
        group: as for :func:`order`.
    """
    if len(forward) != pipeline * virtual:
        raise ValueError(f"costs of {len(forward)} chunks for {pipeline} x {virtual}")
    if backward is None:
        backward = [[2 * seconds for seconds in chunk] for chunk in forward]
    orders = [order(rank, pipeline, virtual, len(forward[0]), group) for rank in range(pipeline)]
    finish = _finish_times(orders, forward, backward, latency if pipeline > 1 else 0.0)
    busy = [sum(sum(forward[c]) + sum(backward[c]) for c in range(r, len(forward), pipeline)) for r in range(pipeline)]
    makespan = max(finish)
    alive = [_most_alive(tasks, virtual) for tasks in orders]
    return Simulation(makespan, busy, [makespan - seconds for seconds in busy], alive)


def _finish_times(
    orders: list[list[Task]],
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    latency: float,
) -> list[float]:
    """When each rank has finished its tasks.

    Raises:
        ValueError: the ranks wait for one another in a circle.
    """
    pipeline, chunks = len(orders), len(forward)
    # When the input of a task is there: of the first chunk's forward passes at once.
    inputs: list[list[float | None]] = [[None if c else 0.0] * len(forward[0]) for c in range(chunks)]
    gradients: list[list[float | None]] = [[None] * len(forward[0]) for _ in range(chunks)]
    clock, done = [0.0] * pipeline, [0] * pipeline
    progress = True
    while progress:
        progress = False
        for rank, tasks in enumerate(orders):
            while done[rank] < len(tasks):
                is_forward, chunk, m = tasks[done[rank]]
                number = chunk * pipeline + rank
                there = (inputs if is_forward else gradients)[number][m]
                if there is None:
                    break
                end = max(clock[rank], there) + (forward if is_forward else backward)[number][m]
                if is_forward and number == chunks - 1:
                    gradients[number][m] = end
                elif is_forward:
                    inputs[number + 1][m] = end + latency
                elif number:
                    gradients[number - 1][m] = end + latency
                clock[rank] = end
                done[rank] += 1
                progress = True
    if any(n < len(tasks) for n, tasks in zip(done, orders)):
        raise ValueError(f"the ranks wait for one another after {done} tasks")
    return clock


def _most_alive(tasks: Sequence[Task], virtual: int) -> list[int]:
    alive, most = [0] * virtual, [0] * virtual
    for task in tasks:
        alive[task.chunk] += 1 if task.is_forward else -1
        if sum(alive) > sum(most):
            most = list(alive)
    return most
