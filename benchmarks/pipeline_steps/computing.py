"""Training steps of the real model over a pipeline, their passes timed."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import schedules

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.routing.pipeline import simulate
from megatron_ext.training.setup import build_model, build_optimizer
from megatron_ext.training.step import train_step
from megatron_ext.transformer.resolved import resolve
from training_step.random_rows import step_input

VOCABULARY = 2048


@dataclass
class Passes:
    """The passes of a step on this rank: when each began and ended, by the clock that all processes share, and its
    seconds of a CPU."""

    forward: list[tuple[float, float, float]] = field(default_factory=list)
    backward: list[tuple[float, float, float]] = field(default_factory=list)


def measure(settings: list[str], cases: dict[str, tuple[str, Batch]], repeats: int) -> dict[str, dict]:
    """Steps of one replica without an interleaved schedule, in which the cases take turns; call it on all ranks.

    Args:
        settings: of the configuration, without the layout.
        cases: by name a layout and the rows of the step in the order of its micro-batches.

    Returns:
        For each case medians: the seconds between the first pass and the end of the last one ("seconds"), and those of
        the step that is simulated from the seconds that each of its passes took ("simulated"), and from the seconds of
        a CPU that it took, which other processes change less ("of_cpu_seconds").
    """
    parallel_state.initialize_model_parallel(1, dist.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    runs = {}
    for layout in {layout for layout, _ in cases.values()}:
        config = config_file.load(Config, [], [*settings, f"parallel.layout={layout}"])
        chunks = build_model(resolve(config, VOCABULARY))
        runs[layout] = config, chunks, build_optimizer(config, chunks)
    inputs = {name: step_input(batch, runs[layout][0]) for name, (layout, batch) in cases.items()}
    measured = {name: [] for name in cases}
    for _ in range(repeats + 1):
        for name, (layout, _) in cases.items():
            config, chunks, optimizer = runs[layout]
            dist.barrier()
            with _timed() as passes:
                train_step(chunks, optimizer, inputs[name], config)
            measured[name].append(_step(passes))
    return {
        name: {key: statistics.median(step[key] for step in steps[1:]) for key in steps[0]}
        for name, steps in measured.items()
    }


@contextmanager
def _timed() -> Iterator[Passes]:
    """Time the passes of Megatron-Core's schedule."""
    passes, forward, backward = Passes(), schedules.forward_step, schedules.backward_step

    def timed(function, times):
        def call(*arguments, **options):
            start, busy = time.perf_counter(), time.thread_time()
            result = function(*arguments, **options)
            times.append((start, time.perf_counter(), time.thread_time() - busy))
            return result

        return call

    schedules.forward_step, schedules.backward_step = timed(forward, passes.forward), timed(backward, passes.backward)
    try:
        yield passes
    finally:
        schedules.forward_step, schedules.backward_step = forward, backward


def _step(own: Passes) -> dict[str, float]:
    """The figures of a step from the passes of all ranks."""
    ranks: list[Passes] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    passes = [each for rank in ranks for each in rank.forward + rank.backward]
    figures = {"seconds": max(end for _, end, _ in passes) - min(start for start, *_ in passes)}
    for name, seconds in (
        ("simulated", lambda start, end, _: end - start),
        ("of_cpu_seconds", lambda *times: times[2]),
    ):
        forward, backward = (
            [[seconds(*each) for each in passes] for passes in kind]
            for kind in ([rank.forward for rank in ranks], [rank.backward for rank in ranks])
        )
        figures[name] = simulate(forward, len(ranks), backward=backward).makespan
    return figures
