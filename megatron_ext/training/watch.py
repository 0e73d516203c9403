"""Where this process is in its step, and a thread that ends the run when no rank gets on.

The training thread says where it is (:func:`at`, :func:`enter`): an assignment. A thread of every rank writes this as
its *beat* every few seconds, through a store, where others can read it. A rank that has not moved for
``lifecycle.hang_minutes`` reads the beats of all. If no rank moves (``hang_report.py`` judges), it writes who holds up
the run to ``OUTPUT/hang/step_N.json`` and one line to standard error; then all ranks write the stacks of their threads
to ``OUTPUT/hang/rank_R.txt`` and end with exit code 75, so that a launcher starts them again.

A thread of C in faulthandler writes the stacks even while Python code holds the interpreter lock; SIGUSR2 writes them
at any time, and the process goes on.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.config import Config
from megatron_ext.distributed import device, from_rank_zero
from megatron_ext.errors import UserError
from megatron_ext.training import hang_report, starts
from megatron_ext.training.beats import Beats

EXIT_CODE = 75
"""Of a run that hangs (EX_TEMPFAIL: starting again may help)."""

LONG_PHASES = ("start", "save", "evaluate", "end")
LONGER = 6
"""Such a phase, and the first step, which compiles and opens data, may take this many times ``hang_minutes``."""

_Place = tuple[int, str, int]
_place: _Place = (0, "start", 0)


def at(step: int, phase: str, number: int = 0) -> None:
    """Say where the training thread is. Every call counts as progress, also with the same arguments.

    Args:
        step: 1, 2, ...; 0: before the first.
        phase: start, data, forward, backward, reduce, prefetch (of the next step's data), optimizer, callbacks, save,
            evaluate or end.
        number: counts inside of the phase, such as the passes over micro-batches.
    """
    global _place
    _place = (step, phase, number)


def enter(phase: str, number: int = 0) -> None:
    """Say that the present step is in this phase."""
    at(_place[0], phase, number)


def advance() -> None:
    """Say that the present phase gets on."""
    step, phase, number = _place
    at(step, phase, number + 1)


def enter_pass(phase: str) -> None:
    """Say that the next forward or backward pass begins; one of an evaluation is part of that."""
    step, now, number = _place
    at(step, now if now in ("save", "evaluate") else phase, number + 1)


@contextlib.contextmanager
def watching(config: Config) -> Iterator[None]:
    """Watch what runs inside, if ``lifecycle.hang_minutes`` says so. Collective.

    Raises:
        UserError: no file can be made in the output folder.
    """
    if not config.lifecycle.hang_minutes:
        yield
        return
    at(0, "start")
    watch = Watch(60 * config.lifecycle.hang_minutes, Path(config.output) / "hang", _beats())
    try:
        yield
    except BaseException as error:
        watch.close(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        raise
    at(_place[0], "end")
    watch.close()
    arrived = torch.zeros(1, device=device())
    dist.all_reduce(arrived)
    arrived.item()  # the rank that holds the store must not leave while others still write to it


def _beats() -> Beats | None:
    if dist.get_world_size() == 1:
        return None
    token = from_rank_zero(lambda: uuid.uuid4().hex)  # the store of a launcher survives a restart
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    return Beats(dist.PrefixStore(f"watch/{token}", store), dist.get_rank(), dist.get_world_size())


class Watch:
    """Watches the thread that creates it until :meth:`close`.

    Args:
        limit: seconds without progress after which the ranks are judged.
        folder: of the reports.
        beats: of all ranks; None for a single process.
        leave: ends the process.
    """

    def __init__(self, limit: float, folder: Path, beats: Beats | None, leave: Callable[[int], None] = os._exit):
        self._limit, self._folder, self._beats, self._leave = limit, folder, beats, leave
        self._interval = min(2.5, limit / 15)
        self._rank = beats.rank if beats else 0
        self._identity = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid()}
        if beats and parallel_state.get_pipeline_model_parallel_world_size() > 1:
            self._identity["previous"] = parallel_state.get_pipeline_model_parallel_prev_rank()
        self._thread = threading.get_ident()
        self._started = time.time()
        self._seen, self._since, self._count = _place, time.monotonic(), 0
        self._looked = self._since
        self._first_step: int | None = None
        self._readings: list[list[dict]] = []
        self._stacks = _open(folder / f"rank_{self._rank}.txt")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._closed = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def close(self, error: str = "") -> None:
        """End watching; the other ranks are told with which error this rank leaves."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        if self._beats:
            self._beats.write({**self._beat(), "ended": error or "complete"})
        if os.fstat(self._stacks.fileno()).st_size == 0:
            with contextlib.suppress(OSError):
                os.unlink(self._stacks.name)
                self._folder.rmdir()  # unless others' files are there

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked > self._interval + 10:
            self._since = now  # the whole process was stopped for a while: nobody's fault
        self._looked = now
        if _place is not self._seen or not self._count:
            self._seen, self._since, self._readings = _place, now, []
            step, phase, _ = _place
            if self._first_step is None and phase != "start":
                self._first_step = step
            # Expires when this thread cannot run: about when another rank ends the run.
            faulthandler.dump_traceback_later(self._allowed() + 2 * self._interval, file=self._stacks)
        self._count += 1
        beat = self._beat()
        if self._beats and self._beats.write(beat):
            self._end()
        elif beat["unmoved"] > self._allowed():
            self._suspect(beat)

    def _allowed(self) -> float:
        """Seconds that the present phase may take."""
        step, phase, _ = self._seen
        return self._limit * (LONGER if phase in LONG_PHASES or step == self._first_step else 1)

    def _beat(self) -> dict:
        """What others can read about this rank; with the stack once it has not moved for a while."""
        unmoved = time.monotonic() - self._since
        step, phase, number = self._seen
        beat = self._identity | {"count": self._count}
        beat |= {"step": step, "phase": phase, "number": number, "unmoved": unmoved, "allowed": self._allowed()}
        if unmoved > self._allowed() / 2:
            frames = sys._current_frames()
            beat |= hang_report.activity(frames.pop(self._thread), list(frames.values()), phase)
        return beat

    def _suspect(self, beat: dict) -> None:
        """Judge all ranks. One whose beat has not changed for two readings is silent."""
        if self._beats is None:
            self._declare([beat])
            return
        if not self._readings and not self._beats.may_judge(self._seen, beat["unmoved"] > self._allowed() + 60):
            return
        ranks = self._beats.read()
        if ranks is None:
            holder = {"rank": 0, "host": os.environ["MASTER_ADDR"], "silent": True, "holds_store": True}
            self._declare([{**beat, **holder}, beat] if self._rank else [beat])
            return
        self._readings = [*self._readings[-2:], ranks]
        for rank, earlier in zip(ranks, self._readings[0]):
            rank["silent"] = "ended" not in rank and rank.get("count") == earlier.get("count")
        ranks[self._rank] = {**beat, "silent": False}
        if len(self._readings) == 3 and hang_report.all_stuck(ranks, 3 * self._interval):
            self._declare(ranks)

    def _declare(self, ranks: list[dict], remark: str = "") -> None:
        """Report a hang, and end all ranks."""
        report = hang_report.report(ranks, self._folder)
        report["line"] += remark
        if hang_report.write(report, self._folder, self._started):
            os.write(2, f"{report['line']}\n".encode())
            starts.record_error(self._folder.parent, self._rank, UserError(report["line"]))
        if self._beats:
            self._beats.declare()
        self._end()

    def _end(self) -> None:
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        faulthandler.cancel_dump_traceback_later()
        self._closed.wait(2 * self._interval)  # the launcher ends the other ranks after this one
        self._leave(EXIT_CODE)


def _open(file: Path):
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("a")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
