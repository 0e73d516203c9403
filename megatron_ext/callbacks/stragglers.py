"""Ranks that compute more slowly than the others, which all wait for them."""

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
    compared, each relative to its own first measurement. Ranks whose replicas have less than half or more than twice
    the FLOPs are no peers, since passes over few rows are slower; one without rows has no speed. Tensor-parallel ranks
    wait for one another inside of a pass, so one slow device slows its whole tensor-parallel group.
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
        self._first = [0.0] * len(ranks)

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
        own = torch.tensor([[self._flops, seconds]], dtype=torch.float64, device=device())
        measured = torch.empty(len(self._places), 2, dtype=torch.float64, device=device())
        dist.all_gather_into_tensor(measured, own)
        relative = self._relative(*measured.T.tolist())
        slowest = min(relative, key=relative.get, default=0)
        record.metrics |= {"slowest_rank": slowest, "slowest_rank_speed": relative.get(slowest, 1.0)}
        for rank in range(len(self._places)):
            speed = relative.get(rank, 1.0)
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

    def _relative(self, flops: list[float], seconds: list[float]) -> dict[int, float]:
        speeds = [n / s if s else 0.0 for n, s in zip(flops, seconds)]
        if has_peers(self._stages):
            return relative_speeds(speeds, flops, self._stages)
        self._first = [first or speed for speed, first in zip(speeds, self._first)]
        since_first = [speed / first if first else 0.0 for speed, first in zip(speeds, self._first)]
        return relative_speeds(since_first, flops, [0] * len(speeds))


def has_peers(stages: Sequence[int]) -> bool:
    """Whether every pipeline stage has several ranks; ``stages``: that of each rank."""
    return min(map(list(stages).count, stages)) > 1


def relative_speeds(speeds: Sequence[float], flops: Sequence[float], stages: Sequence[int]) -> dict[int, float]:
    """The speed of each rank with FLOPs relative to the median of its peers and itself, to the higher one where two are
    in the middle: the ranks of its stage that have between half and twice its FLOPs."""
    relative = {}
    for rank, own in enumerate(flops):
        if own:
            of_stage = [r for r, stage in enumerate(stages) if stage == stages[rank]]
            median = statistics.median_high(speeds[r] for r in of_stage if own <= 2 * flops[r] <= 4 * own)
            relative[rank] = speeds[rank] / median if median else 1.0
    return relative
