"""When a run stops before its last iteration: on a signal, at a time limit, or shortly before its Slurm job ends.

A run that is told to stop saves a checkpoint and exits with code 0, as a complete run does; only a complete one leaves
``OUTPUT/FINISHED`` (``finished.py``). Nothing here requeues a job: ``examples/run_unified_tp4_pp2.sh`` does
(``scontrol requeue``), when training has exited with 0 and without that file. ``stop_signals.py`` remembers what came
before training began.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Mapping

import torch

from megatron_ext.run_config import LifecycleConfig
from megatron_ext.training import stop_signals
from megatron_ext.training.stop_signals import SIGNALS

_REASONS = (
    None,
    "lifecycle.time_limit_minutes is used up",
    "the Slurm job ends soon",
    "received SIGUSR1",
    "received SIGTERM",
    "received SIGINT",
)
_TIME_LIMIT, _JOB_END, _FIRST_SIGNAL = 1, 2, 3
_BITS = 20


class Lifecycle:
    """Knows whether this process was asked to stop, and makes all ranks stop after the same iteration.

    Catches SIGUSR1 (Slurm's ``--signal``), SIGTERM and SIGINT until :meth:`close`. A second Ctrl-C, at least a second
    after the first, interrupts at once (launchers repeat the first to their workers within milliseconds).

    Args:
        environment: holds ``SLURM_JOB_END_TIME`` (seconds since 1970) in a Slurm job.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        config: LifecycleConfig,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
    ):
        self._clock = clock
        self._signal_code = 0
        self._interrupted_at: float | None = None
        self._deadlines: list[tuple[float, int]] = []
        if config.time_limit_minutes:
            self._deadlines.append((clock() + 60 * config.time_limit_minutes, _TIME_LIMIT))
        if job_end := environment.get("SLURM_JOB_END_TIME"):
            self._deadlines.append((float(job_end) - 60 * config.slurm_margin_minutes, _JOB_END))
        self._previous_handlers = {s: signal.signal(s, self._handle) for s in SIGNALS}
        stop_signals.taken_over()
        for number in stop_signals.received():
            self._handle(number, None)

    def stop_flag(self) -> float:
        """Whether and why this rank asks to stop, for a sum over all ranks; 0: it does not ask.

        Reason ``c`` is the flag 2^(20 c), so the sum over up to a million ranks still shows the highest reason. The
        flag travels in a reduction that every step does anyway, and costs no communication of its own.
        """
        return _flag(self._local_code())

    def signal_flag(self) -> float:
        """As :meth:`stop_flag`, but for signals alone: a run takes at least one step before a deadline ends it."""
        return _flag(self._signal_code)

    @staticmethod
    def stop_reason(stop_flags: float) -> str | None:
        """Why the run stops after this iteration, the same on every rank; None: it continues.

        Args:
            stop_flags: the sum in float64 of every rank's :meth:`stop_flag`.
        """
        return _REASONS[int(math.log2(stop_flags)) // _BITS] if stop_flags else None

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _local_code(self) -> int:
        now = self._clock()
        return max([self._signal_code, *(code for deadline, code in self._deadlines if now >= deadline)])

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            now = self._clock()
            if self._interrupted_at is not None and now - self._interrupted_at >= 1:
                raise KeyboardInterrupt
            self._interrupted_at = now
        self._signal_code = max(self._signal_code, _code(number))


def told_already(lifecycle: Lifecycle | None = None) -> str | None:
    """Why the run stops before its first step, the same on every rank: a signal has come. Collective.

    Args:
        lifecycle: None: before there is one.
    """
    own = lifecycle.signal_flag() if lifecycle else _flag(max(map(_code, stop_signals.received()), default=0))
    flags = torch.tensor([own], dtype=torch.float64, device=torch.device(torch.cuda.current_device()))
    torch.distributed.all_reduce(flags)
    return Lifecycle.stop_reason(flags.item())


def _code(number: int) -> int:
    return _FIRST_SIGNAL + SIGNALS.index(number)


def _flag(code: int) -> float:
    return 2.0 ** (_BITS * code) if code else 0.0
