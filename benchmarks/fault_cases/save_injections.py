"""Callbacks that hold up a run, or do harm while it writes a checkpoint.

The latter strike once per run, right before the save on ``FAULT_RANK`` (0) after ``FAULT_ITERATION``.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_ext.training.callback import Callback

CHANGES = ("mkdir", "rename", "replace", "fsync", "rmdir")
"""Functions of ``os`` that change the file system."""


class Pause(Callback):
    """Before each iteration N of ``FAULT_PAUSES`` (3,7) waits until the file ``FAULT_GO``-N is there."""

    def before_step(self, run, step) -> None:
        iteration = str(run.progress.iteration + 1)
        if dist.get_rank() == 0 and iteration in os.environ["FAULT_PAUSES"].split(","):
            while not Path(f"{os.environ['FAULT_GO']}-{iteration}").exists():
                time.sleep(0.02)


class InSave(Callback):
    """Calls :meth:`arm` before the save."""

    def arm(self) -> None:
        raise NotImplementedError

    def after_step(self, run, record) -> None:
        mark = Path(run.config.output) / ".fault-in-save"
        where = (int(os.environ.get("FAULT_RANK", 0)), int(os.environ["FAULT_ITERATION"]))
        if (dist.get_rank(), record.iteration) == where and not mark.exists():
            mark.touch()
            self.arm()


class KillInSave(InSave):
    """SIGKILL before the ``FAULT_CHANGE``-th change to the file system in the save."""

    def arm(self) -> None:
        changes = iter(range(1, int(os.environ["FAULT_CHANGE"])))

        def strike() -> None:
            if next(changes, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        _before_every_change(strike)


class TerminateInSave(InSave):
    """SIGTERM in the midst of the save."""

    def arm(self) -> None:
        signals = iter([signal.SIGTERM])

        def strike() -> None:
            if number := next(signals, None):
                os.kill(os.getpid(), number)

        _before_every_change(strike)


def _before_every_change(strike: Callable[[], None]) -> None:
    def watched(change: Callable) -> Callable:
        def struck(*args, **kwargs):
            strike()
            return change(*args, **kwargs)

        return struck

    for name in CHANGES:
        setattr(os, name, watched(getattr(os, name)))
    shutil.rmtree = watched(shutil.rmtree)
