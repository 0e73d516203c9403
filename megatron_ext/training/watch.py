"""Where this process is in its step, and a thread that ends the run when no rank gets on.

The training thread says where it is (:func:`at`, :func:`enter`): an assignment. A thread of every rank writes this as
its *beat* every few seconds, through a store, where others can read it. A rank that has not moved for
``lifecycle.hang_minutes`` reads the beats of all. If no rank moves (``hang_report.py`` judges), it tells all ranks, and
says who holds up the run in one line on standard error and in ``OUTPUT/hang/step_N.json``. All ranks write the stacks
of their threads to ``OUTPUT/hang/rank_R.txt`` and end with exit code 75, so that a launcher starts them again; also
where a file system does not answer.

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
from megatron_ext.run_config import LONGER
from megatron_ext.training import hang_report, starts
from megatron_ext.training.beats import Beats
from megatron_ext.training.helper_thread import HelperThread

EXIT_CODE = 75
"""Of a run that hangs (EX_TEMPFAIL: starting again may help)."""

LONG_PHASES = ("start", "before_step", "callbacks", "save", "evaluate", "end")
"""May take ``LONGER`` times the limit."""

_SILENT = 60.0  # seconds without a new beat, or without the store, after which a rank is silent
_FILES = 10.0  # seconds that each file about a hang may take

_Place = tuple[int, str, int]
_place: _Place = (0, "start", 0)


def at(step: int, phase: str, number: int = 0) -> None:
    """Say where the training thread is. Every call counts as progress, also with the same arguments.

    Args:
        step: 1, 2, ...; 0: before the first.
        phase: start, data, before_step (callbacks), forward, backward, reduce, prefetch (of the next step's data),
            optimizer, callbacks, save, evaluate or end.
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
    token = from_rank_zero(lambda: uuid.uuid4().hex)
    watch = Watch(60 * config.lifecycle.hang_minutes, Path(config.output) / "hang", _beats(token), token)
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


def _beats(token: str) -> Beats | None:
    if dist.get_world_size() == 1:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    def connect() -> dist.Store:
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        return dist.PrefixStore(f"watch/{token}", store)  # the store of a launcher survives a restart

    return Beats(connect, dist.get_rank(), dist.get_world_size())


class Watch:
    """Watches the thread that creates it until :meth:`close`.

    Args:
        limit: seconds without progress after which the ranks are judged.
        folder: of the reports.
        beats: of all ranks; None for a single process.
        token: names this start of the run, the same on every rank.
        leave: ends the process.
    """

    def __init__(
        self, limit: float, folder: Path, beats: Beats | None, token: str, leave: Callable[[int], None] = os._exit
    ):
        self._limit, self._folder, self._beats, self._token, self._leave = limit, folder, beats, token, leave
        self._interval = min(2.5, limit / 15)
        self._patience = min(_SILENT, limit / 2)
        self._rank = beats.rank if beats else 0
        self._identity = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid()}
        if beats and parallel_state.get_pipeline_model_parallel_world_size() > 1:
            self._identity["previous"] = parallel_state.get_pipeline_model_parallel_prev_rank()
        self._thread = threading.get_ident()
        self._activity = HelperThread("activity")
        self._seen, self._since, self._count = _place, time.monotonic(), 0
        self._looked = self._since
        self._first_step: int | None = None
        self._counts: list[tuple[float, list]] = []  # when the beats were read, and their counts
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
        said = ""
        while not self._closed.wait(self._interval):
            try:
                self._look()
            except Exception as error:  # of any kind: a run that is not watched may hang for ever
                if repr(error) != said:
                    said = repr(error)
                    os.write(2, f"watch: {said}\n".encode())
            self._looked = time.monotonic()

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked > self._interval + 10:
            self._since, self._counts = now, []  # the whole process was stopped for a while: nobody's fault
        if _place is not self._seen or not self._count:
            self._seen, self._since, self._counts = _place, now, []
            step, phase, _ = _place
            if self._first_step is None and phase != "start":
                self._first_step = step
            # Expires when this thread cannot run: about when another rank ends the run.
            later = self._allowed() + self._patience + 2 * self._interval
            faulthandler.dump_traceback_later(later, file=self._stacks)
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
            own = frames.pop(self._thread)
            # It reads sources and /proc.
            beat |= self._activity.call(lambda: hang_report.activity(own, list(frames.values()), phase), 5) or {}
        return beat

    def _suspect(self, beat: dict) -> None:
        """Judge all ranks."""
        if self._beats is None:
            ranks = [{**beat, "silent": False}]
        else:
            if not self._counts and not self._beats.may_judge(self._seen, beat["unmoved"] > self._allowed() + 60):
                return
            ranks = self._beats.read()
            if ranks is None:
                if self._beats.failing_seconds() > _SILENT:
                    holder = {"rank": 0, "host": os.environ["MASTER_ADDR"], "silent": True, "holds_store": True}
                    self._declare([{**beat, **holder}, beat] if self._rank else [beat])
                return
            if not self._find_silent(ranks):
                return
            ranks[self._rank] = {**beat, "silent": False}
        if hang_report.all_stuck(ranks, 3 * self._interval):
            self._declare(ranks)

    def _find_silent(self, ranks: list[dict]) -> bool:
        """Mark the ranks whose beats have not changed for a while; whether that is known yet."""
        now = time.monotonic()
        self._counts.append((now, [rank.get("count") for rank in ranks]))
        while len(self._counts) > 1 and self._counts[1][0] <= now - self._patience:
            self._counts.pop(0)
        since, counts = self._counts[0]
        for rank, count in zip(ranks, counts):
            rank["silent"] = "ended" not in rank and rank.get("count") == count
        return now - since >= self._patience

    def _declare(self, ranks: list[dict]) -> None:
        """End all ranks, and report why."""
        first = self._beats.declare() if self._beats else True
        helper = HelperThread("hang report")
        try:
            helper.call(lambda: self._report(ranks, first), _FILES)
            if helper.error:
                os.write(2, f"the run hangs; no report: {helper.error!r}\n".encode())
        finally:
            self._end()

    def _report(self, ranks: list[dict], first: bool | None) -> None:
        """Report a hang if no other rank does; ``first``: whether this one has declared it first, None: unknown."""
        if first is False:
            return
        report = hang_report.report(ranks, self._folder)
        said = f"{report['line']}\n".encode()
        if first:
            os.write(2, said)
        try:
            written = hang_report.write(report, self._folder, self._token)
        except OSError:  # such as a full disk: no other rank can write it either
            written = True
        if written and not first:
            os.write(2, said)
        if written or first:
            starts.record_error(self._folder.parent, self._rank, UserError(report["line"]))

    def _end(self) -> None:
        try:
            with open(os.memfd_create("stacks"), "r+b") as stacks:  # faulthandler holds the interpreter lock
                faulthandler.dump_traceback(stacks, all_threads=True)
                stacks.seek(0)
                text = stacks.read().decode(errors="replace")
            HelperThread("stacks").call(lambda: self._write_stacks(text), _FILES)
            self._closed.wait(2 * self._interval)  # the launcher ends the other ranks after this one
        finally:
            self._leave(EXIT_CODE)

    def _write_stacks(self, text: str) -> None:
        self._stacks.write(text)
        self._stacks.flush()


def _open(file: Path):
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("a")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
