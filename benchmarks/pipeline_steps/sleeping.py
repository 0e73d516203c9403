"""Megatron-Core's schedule with chunks that sleep for as long as their layers would compute."""

import time

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.routing.pipeline import Task
from pipeline_steps import schedule

BACKWARD = 2
"""A backward pass takes as long as so many forward passes."""

Forward = list[list[list[float]]]
"""Seconds of each forward pass, [replica][P * V chunks][micro-batch]."""


def measure(pipeline: int, virtual: int, steps: list[Forward], repeats: int) -> list[tuple[float, float]]:
    """Seconds of each step, and those that a rank slept in it, on average; of the shortest of so many rounds in which
    the steps take turns, since other processes only add to them. Call it on all ranks."""
    sleep, micro_batches = _Sleep(pipeline), len(steps[0][0][0])
    model = schedule.chunks(pipeline, virtual, micro_batches, sleep)
    schedule.step(model, micro_batches)  # connects the ranks
    shortest = [(float("inf"), 0.0)] * len(steps)
    for _ in range(repeats):
        for number, forward in enumerate(steps):
            sleep.choose(forward)
            dist.barrier()
            start = time.perf_counter()
            schedule.step(model, micro_batches)
            dist.barrier()
            seconds, asleep = time.perf_counter() - start, torch.tensor(sleep.asleep)
            dist.all_reduce(asleep)
            shortest[number] = min(shortest[number], (seconds, asleep.item() / dist.get_world_size()))
    return shortest


class _Sleep:
    """Sleeps for a task of this rank."""

    def __init__(self, pipeline: int):
        self.pipeline, self.own, self.asleep = pipeline, None, 0.0

    def choose(self, forward: Forward) -> None:
        """The step that is slept from now on; before, no task takes time."""
        rank = parallel_state.get_pipeline_model_parallel_rank()
        self.own = forward[parallel_state.get_data_parallel_rank()][rank :: self.pipeline]
        self.asleep = 0.0

    def __call__(self, task: Task) -> None:
        if self.own:
            seconds = self.own[task.chunk][task.micro_batch]
            start = time.perf_counter()
            time.sleep(seconds if task.is_forward else BACKWARD * seconds)
            self.asleep += time.perf_counter() - start
