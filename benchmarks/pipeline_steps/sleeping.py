"""Megatron-Core's schedule with chunks that sleep for as long as their layers would compute."""

import statistics
import time
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.routing.pipeline import Task
from pipeline_steps import schedule

BACKWARD = 2
"""A backward pass takes as long as so many forward passes."""


@dataclass(frozen=True)
class Sleeps:
    """A step to measure.

    Attributes:
        forward: seconds of each forward pass, [replica][P * V chunks][micro-batch].
    """

    pipeline: int
    virtual: int
    forward: list[list[list[float]]]


def measure(steps: list[Sleeps], repeats: int) -> list[float]:
    """Seconds of each step, the median of so many; call it on all ranks."""
    medians = []
    for sleeps in steps:
        model = schedule.chunks(sleeps.pipeline, sleeps.virtual, len(sleeps.forward[0][0]), _Sleep(sleeps))
        # The first step also connects the ranks.
        times = [_seconds(model, len(sleeps.forward[0][0])) for _ in range(repeats + 1)][1:]
        medians.append(statistics.median(times))
    return medians


class _Sleep:
    """Sleeps for a task of this rank."""

    def __init__(self, sleeps: Sleeps):
        self.sleeps = sleeps

    def __call__(self, task: Task) -> None:
        replica, rank = parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
        seconds = self.sleeps.forward[replica][task.chunk * self.sleeps.pipeline + rank][task.micro_batch]
        time.sleep(seconds if task.is_forward else BACKWARD * seconds)


def _seconds(model: list[schedule.Chunk], micro_batches: int) -> float:
    """From the moment when all ranks are ready to the moment when all have done their tasks."""
    dist.barrier()
    start = time.perf_counter()
    schedule.step(model, micro_batches)
    dist.barrier()
    return time.perf_counter() - start
