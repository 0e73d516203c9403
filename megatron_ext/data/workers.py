"""The worker processes that pack rows ahead of training: how they start and how they end.

They are spawned and import only numpy and the numpy part of this package, so they are ready in well under a second.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker

import numpy as np

from megatron_ext.data import reading
from megatron_ext.data.serialization import to_bytes
from megatron_ext.data.step_rows import StepRows
from megatron_ext.errors import UserError

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that Slurm, or a terminal, sends to all processes, and that are meant for the trainer alone."""

SECONDS_TO_NOTICE = 60
"""A trainer that has not noticed a lost worker after this many seconds would wait for it forever."""


class Workers:
    """The processes of one loader."""

    def __init__(self):
        self._processes: list[multiprocessing.Process] = []
        self._closed = threading.Event()

    @contextmanager
    def starting(self):
        """Processes started inside this context are these workers.

        They do not import the main program: they do not need it, importing it takes seconds (Megatron-Core), and a
        program without a ``__main__`` guard would run again. Terminating them kills them, because they ignore SIGTERM.
        They inherit the signal mask, so no signal ends them before they ignore it.
        """
        before = set(multiprocessing.active_children())
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING_SIGNALS)
        # Python's own helper process ignores SIGINT and SIGTERM but not SIGUSR1, which Slurm sends to it too.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING_SIGNALS)  # starting it unblocks SIGINT and SIGTERM
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            sys.modules["__main__"] = main
            self._processes = list(set(multiprocessing.active_children()) - before)
            for process in self._processes:
                process.terminate = process.kill

            if self._processes:
                threading.Thread(target=self._watch, daemon=True).start()

    def check(self) -> None:
        """Check that all processes are running (DALI would wait for a lost one forever).

        Raises:
            UserError: a process has ended.
        """
        # The sentinel is immediate and visible to all threads; is_alive() is wrong while another one reaps the process.
        ended = connection.wait([process.sentinel for process in self._processes], timeout=0)
        for process in self._processes:
            if process.sentinel in ended:
                raise UserError(_lost(process))

    def close(self) -> None:
        """Let the processes end."""
        self._closed.set()

    def _watch(self) -> None:
        """End this process if a worker is lost while the trainer waits for it and so cannot raise an exception."""
        connection.wait([process.sentinel for process in self._processes])
        if not self._closed.wait(SECONDS_TO_NOTICE):
            process = next(p for p in self._processes if connection.wait([p.sentinel], timeout=0))
            print(f"error: {_lost(process)}", file=sys.stderr, flush=True)
            os._exit(1)


def _lost(process: multiprocessing.Process) -> str:
    give_up = time.monotonic() + 5
    while process.exitcode is None and time.monotonic() < give_up:
        time.sleep(0.01)  # another thread is reaping it
    return (
        f"a process that packs data ended with exit code {process.exitcode} (-9: killed, usually out of memory); "
        "lower data.workers or data.prefetch and start again to resume"
    )


class WorkerSteps:
    """The steps ``start`` to ``end`` of a replica, as worker processes make them: ``prepare`` turns the rows of a step
    into a structure, which is stored in one buffer (:mod:`megatron_ext.data.serialization`).

    ``steps[step]`` serves torch's loader, ``steps.sample(sample_info)`` serves DALI.
    """

    def __init__(self, rows: StepRows, start: int, end: int, prepare: Callable[[np.ndarray, int], object]):
        """
        Args:
            prepare: called with the rows of a step as packed tokens (:mod:`megatron_ext.data.packed_tokens`), and its
                number.
        """
        self.rows = rows
        self.start = start
        self.end = end
        self._prepare = prepare
        self._ready_in = os.getpid()  # the process that creates this object is not a worker

    def __getitem__(self, step: int) -> np.ndarray:
        if self._ready_in != os.getpid():
            _prepare_worker()
            self._ready_in = os.getpid()
        buffer = to_bytes(self._prepare(self.rows[step], step))
        reading.note(None)
        return buffer

    def sample(self, sample_info) -> np.ndarray:
        step = self.start + sample_info.idx_in_epoch
        if step >= self.end:
            raise StopIteration
        return self[step]


def _prepare_worker() -> None:
    """Make this process live exactly as long as the trainer.

    Signals that stop the trainer may reach the whole process group, but the trainer must be able to finish its step.
    When the trainer ends, even by SIGKILL, this process ends too.
    """
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
