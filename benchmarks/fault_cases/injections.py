"""Callbacks that do harm: on one rank, before one step, once per run.

``FAULT_RANK`` (0) and ``FAULT_ITERATION`` (1, the iteration that is about to be trained) say where; ``FAULT_TIMES`` (1)
says how often in all, over restarts. Each time leaves a file ``OUTPUT/.fault-N``.
"""

import os
import signal
import time
from pathlib import Path

import torch.distributed as dist

from megatron_ext.errors import UserError
from megatron_ext.training.callback import Callback


class Fault(Callback):
    """Calls :meth:`strike` where and as often as the environment says."""

    def strike(self, run, step) -> None:
        raise NotImplementedError

    def before_step(self, run, step) -> None:
        rank, iteration = int(os.environ.get("FAULT_RANK", 0)), int(os.environ.get("FAULT_ITERATION", 1))
        if dist.get_rank() != rank or run.progress.iteration + 1 != iteration:
            return
        for number in range(int(os.environ.get("FAULT_TIMES", 1))):
            mark = Path(run.config.output) / f".fault-{number}"
            if not mark.exists():
                mark.touch()
                self.strike(run, step)
                return


class Kill(Fault):
    """SIGKILL to the rank."""

    def strike(self, run, step) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Crash(Fault):
    """An error that nobody expects."""

    def strike(self, run, step) -> None:
        raise RuntimeError(f"injected in iteration {run.progress.iteration + 1}")


class Refuse(Fault):
    """A :class:`UserError` on one rank only."""

    def strike(self, run, step) -> None:
        raise UserError("injected: something only this rank can see is wrong")


class Slow(Callback):
    """No harm: every step takes ``FAULT_SLEEP`` (0.5) seconds longer, so that there is time for harm from outside."""

    def before_step(self, run, step) -> None:
        time.sleep(float(os.environ.get("FAULT_SLEEP", 0.5)))
