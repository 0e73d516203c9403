"""Ranks that compute more slowly than the others, which all wait for them."""

import math
import socket
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from megatron_ext.distributed import device, report
from megatron_ext.training.callback import Callback, StepRecord
from megatron_ext.training.prepare import StepInput
from megatron_ext.training.run import Run
from megatron_ext.training.schedule_timers import ScheduleTimers

SLOW = 0.85
"""Part of its peers' median speed below which a rank is slow."""

IN_A_ROW = 3
"""Comparisons in a row that a rank must be slow for."""

MEASURED = 10
"""Steps measured before each comparison, at most."""


class Stragglers(Callback):
    """Compares the ranks' speeds every ``logging.straggler_interval`` iterations, by one small message.

    A rank's speed is the FLOPs of its rows over the time of its forward and backward passes. Its peers are the ranks of
    the same pipeline stage, which compute the same layers. A stage of a single rank has none: then all ranks are
    compared, each relative to its own first measurement. Tensor-parallel ranks wait for one another inside of a pass,
    so one slow device slows its whole tensor-parallel group.
    """

    def on_train_begin(self, run: Run) -> None:
        self._interval = run.config.logging.straggler_interval
        self._timers: ScheduleTimers = get_model_config(run.chunks[0]).timers
        self._flops = 0.0
        self._measures = False  # the same on every rank
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        here = (parallel_state.get_pipeline_model_parallel_rank(), f"{socket.gethostname()}, {device()}, {name}")
        ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, here)
        self._stages, self._places = zip(*ranks)
        self._slow = [0] * len(ranks)
        self._first = [math.nan] * len(ranks)

    def before_step(self, run: Run, step: StepInput) -> None:
        number = run.progress.iteration % self._interval + 1
        if number == max(1, self._interval - MEASURED + 1):
            self._timers.measure()
            self._measures, self._flops = True, 0.0
        self._flops += step.flops

    def after_step(self, run: Run, record: StepRecord) -> None:
        if record.iteration % self._interval or not self._measures:  # after a resumption there may be too few steps
            return
        self._measures = False
        seconds = self._timers.busy_seconds()
        # A replica without rows has no speed.
        speed = self._flops / seconds if seconds and self._flops else math.nan
        own = torch.tensor([speed], dtype=torch.float64, device=device())
        speeds = torch.empty(len(self._places), dtype=torch.float64, device=device())
        dist.all_gather_into_tensor(speeds, own)
        relative = self._relative(speeds.tolist())
        known = [rank for rank, speed in enumerate(relative) if not math.isnan(speed)]
        if known:
            slowest = min(known, key=relative.__getitem__)
            record.metrics |= {"slowest_rank": slowest, "slowest_rank_speed": relative[slowest]}
        for rank, speed in enumerate(relative):
            self._slow[rank] = self._slow[rank] + 1 if speed < SLOW else 0
            if self._slow[rank] == IN_A_ROW:
                report(f"iteration {record.iteration}: {self.line(rank, speed)}")
        slow = [self.line(rank, relative[rank]) for rank, times in enumerate(self._slow) if times >= IN_A_ROW]
        if slow:
            record.metrics["stragglers"] = slow
            record.log_now = True

    def line(self, rank: int, speed: float) -> str:
        """Such as ``rank 3 (node-7, cuda:3, H100) computes at 0.71 of the speed of its peers``."""
        return f"rank {rank} ({self._places[rank]}) computes at {speed:.2f} of the speed of its peers"

    def _relative(self, speeds: list[float]) -> list[float]:
        if has_peers(self._stages):
            return relative_speeds(speeds, self._stages)
        self._first = [speed if math.isnan(first) else first for speed, first in zip(speeds, self._first)]
        since_first = [speed / first for speed, first in zip(speeds, self._first)]
        return relative_speeds(since_first, [0] * len(speeds))


def has_peers(stages: Sequence[int]) -> bool:
    """Whether every pipeline stage has several ranks; ``stages``: that of each rank."""
    return min(map(list(stages).count, stages)) > 1


def relative_speeds(speeds: Sequence[float], stages: Sequence[int]) -> list[float]:
    """Each rank's speed relative to the median of its stage, to the higher one where two are in the middle. NaN stands
    for a speed that is not known."""
    known = {stage: [s for s, of in zip(speeds, stages) if of == stage and not math.isnan(s)] for stage in set(stages)}
    median = {stage: statistics.median_high(of_stage) for stage, of_stage in known.items() if of_stage}
    return [speed / median.get(stage, math.nan) for speed, stage in zip(speeds, stages)]
