"""When a run stops before its last iteration: signals, wall-clock limits, and the whole world agreeing on it.

A run that is told to stop saves a checkpoint and leaves with exit code 0, exactly as one that is complete; what tells
the two apart is the file ``OUTPUT/FINISHED``. A launcher starts again a run that left with 0 and without it.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_ext.config import LifecycleConfig
from megatron_ext.files import write_json

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
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
    """Knows whether this process was asked to stop, and makes all ranks stop at the same iteration.

    Catches SIGUSR1 (Slurm's ``--signal``), SIGTERM and SIGINT until :meth:`close`. A second Ctrl-C, a second or more
    after the first, interrupts at once (launchers repeat the first one to their workers within milliseconds).

    Args:
        environment: where ``SLURM_JOB_END_TIME`` (seconds since 1970) is looked up.
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

    def stop_flag(self) -> float:
        """This rank's wish to stop, to be summed over all ranks: 0 for going on.

        Reason ``c`` votes 2^(20 c), so the sum over up to a million ranks still tells the weightiest reason. It rides
        in a reduction that the step does anyway and costs nothing of its own.
        """
        code = self._local_code()
        return 2.0 ** (_BITS * code) if code else 0.0

    @staticmethod
    def stop_reason(votes: float) -> str | None:
        """Why the run should stop now, the same answer on every rank; None: go on.

        Args:
            votes: sum over all ranks of what :meth:`stop_flag` gave them for this iteration, in float64.
        """
        return _REASONS[int(math.log2(votes)) // _BITS] if votes else None

    def close(self) -> None:
        """Give the signals back to whoever handled them before."""
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
        self._signal_code = max(self._signal_code, _FIRST_SIGNAL + SIGNALS.index(number))


def finished_file(output: str | Path) -> Path:
    """The marker of a complete run."""
    return Path(output) / "FINISHED"


def mark_finished(output: str | Path, iteration: int) -> None:
    """Say that the run is complete; call it last, after the final checkpoint is."""
    write_json(finished_file(output), {"iteration": iteration})


def clear_finished(output: str | Path) -> None:
    """Take back an earlier run's mark; call it before the first iteration of a run that has some to do."""
    finished_file(output).unlink(missing_ok=True)
