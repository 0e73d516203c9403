"""Schedules the runs of a study as processes on this machine, several at once.

Written by hand: the programs must inherit the lock of their run, and get signals and GPUs from here, which pools of
Python workers do not offer.
"""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ext import command_line, files
from megatron_ext.errors import UserError
from megatron_ext.study import outcome, state, steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import StudyEvaluation

POLL_SECONDS = 0.2
BAR_SECONDS = 2.0
Start = Callable[[list[str], Path, dict[str, str], int], subprocess.Popen]
"""Starts a program, as :func:`start_program` does."""


def execute(
    runs: Sequence[StudyRun],
    evaluation: StudyEvaluation,
    jobs: int = 1,
    gpus: Sequence[str] = (),
    start: Start | None = None,
) -> None:
    """Do the remaining steps of every run. A run that fails does not stop the others.

    Waits for runs that another process works on. SIGTERM and SIGINT are passed on to the programs, which save and exit.
    However this ends, calling it again resumes the runs.

    Args:
        jobs: runs at once.
        gpus: GPUs to share out, as many to each run as it has processes; empty: the programs choose.
        start: None: :func:`start_program`; :func:`.forked.start_program` starts one sooner.

    Raises:
        UserError: a signal arrived, or a run needs more GPUs than there are.
    """
    for run in runs:
        if gpus and run.processes > len(gpus):
            raise UserError(f"run {run.name}: needs {run.processes} GPUs, --gpus names {len(gpus)}")
    queue, active, free = deque(runs), [], list(gpus)
    total, shown_at = sum(run.iterations for run in runs), 0.0
    with _Signals() as signals, command_line.progress(total=total, desc="iterations", unit="it") as bar:
        messages = _Messages(len(runs), bar.write if not bar.disable else _print)
        while queue or active:
            if signals.received and queue:
                queue.clear()
            locked_run = None
            for _ in range(len(queue)):
                run = queue.popleft()
                if len(active) == jobs or (gpus and len(free) < run.processes):
                    queue.append(run)
                    continue
                if (descriptor := state.lock(run)) is None:
                    queue.append(run)
                    locked_run = run
                    continue
                assigned, free = free[: run.processes], free[run.processes :]
                threads = max(1, (os.cpu_count() or 1) // (jobs * run.processes))
                active.append(_ActiveRun(run, evaluation, descriptor, assigned, threads, start or start_program))
            for active_run in list(active):
                if signals.received:
                    active_run.terminate()
                if active_run.advance():
                    active.remove(active_run)
                    free += active_run.gpus
                    messages.ended(active_run)
            if locked_run and not active:
                messages.waiting_for(locked_run)
            if queue or active:
                time.sleep(POLL_SECONDS)
            if not bar.disable and time.monotonic() > shown_at + BAR_SECONDS:
                bar.update(sum(map(state.trained_iterations, runs)) - bar.n)
                shown_at = time.monotonic()
        if signals.received:
            name = signal.Signals(signals.received).name
            raise UserError(f"stopped by {name}; the same command resumes the study")


def start_program(command: list[str], log: Path, environment: dict[str, str], lock: int) -> subprocess.Popen:
    """Start a program that appends its output to ``log`` and inherits the file descriptor ``lock``."""
    with log.open("a") as output:
        # In a session of its own, Ctrl-C reaches the program only once, through this process.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[lock],
            start_new_session=True,
        )


class _ActiveRun:
    """A run in progress: its programs, one after the other, under the run's lock."""

    def __init__(
        self,
        run: StudyRun,
        evaluation: StudyEvaluation,
        descriptor: int,
        gpus: list[str],
        threads: int,
        start: Start,
    ):
        self.run, self.gpus, self.note, self._start_program = run, gpus, "", start
        self._evaluation, self._lock = evaluation, descriptor
        self._environment = {**os.environ}
        self._environment.setdefault("OMP_NUM_THREADS", str(threads))
        if gpus:
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        self._steps = steps.steps(run, evaluation)
        self._step: steps.Step | None = None
        self._process: subprocess.Popen | None = None
        self._has_begun = self._terminated = False
        self._started = time.monotonic()

    def advance(self) -> bool:
        """Start the next program once the last one has ended. Returns whether the run has ended or cannot proceed."""
        if not self._has_begun:
            self._has_begun = True
            try:
                state.begin(self.run)
            except UserError as error:
                self.note = f"REFUSED: {error}"
                return self._close()
            (self.run.folder / "failed.json").unlink(missing_ok=True)
        try:
            return self._advance()
        except UserError as error:
            self._fail("collecting figures", 1, str(error))
            return self._close()

    def terminate(self) -> None:
        """Ask the program to save and exit; no further program is started."""
        if self._process and self._process.poll() is None and not self._terminated:
            self._process.send_signal(signal.SIGTERM)
        self._terminated = True

    def _advance(self) -> bool:
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return False
            if not self._finish_step(code):
                return self._close()
            self._process = None
        if self._terminated:
            self.note = "stopped"
            return self._close()
        self._step = next((step for step in self._steps if not step.is_done()), None)
        if self._step:
            self._process = self._start(self._step)
            return False
        if state.result(self.run, steps.fingerprint(self.run, self._evaluation)):
            self.note = "already complete"
        else:
            outcome.write(self.run, self._evaluation)
            self.note = f"complete ({time.monotonic() - self._started:.0f} s)"
        return self._close()

    def _start(self, step: steps.Step) -> subprocess.Popen:
        log = self.run.folder / "log.txt"
        with log.open("a") as stream:
            stream.write(f"== {step.name}: {' '.join(step.command)}\n")
        return self._start_program(step.command, log, self._environment, self._lock)

    def _finish_step(self, code: int) -> bool:
        """Conclude the step whose program exited with ``code``. Returns whether the step is done."""
        if code == 0:
            try:
                self._step.finish()
            except UserError as error:
                self._fail(self._step.name, 1, str(error))
                return False
            if self._step.is_done():
                return True
        if self._terminated or code == 0:
            self.note = f"stopped in {self._step.name} at iteration {state.trained_iterations(self.run)}"
        else:
            self._fail(self._step.name, code, state.last_line(self.run.folder / "log.txt"))
        return False

    def _fail(self, step: str, code: int, error: str) -> None:
        self.note = f"FAILED in {step}: {error}"
        files.write_json(self.run.folder / "failed.json", {"step": step, "returncode": code, "error": error})

    def _close(self) -> bool:
        os.close(self._lock)
        return True


class _Signals:
    """Records a SIGTERM or SIGINT instead of exiting; a second SIGINT interrupts at once."""

    def __enter__(self) -> "_Signals":
        self.received = 0
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class _Messages:
    """Prints a line for each run that ends or is waited for."""

    def __init__(self, total: int, write: Callable[[str], None]):
        self._total, self._write, self._number, self._waiting_for = total, write, 0, None

    def ended(self, active_run: _ActiveRun) -> None:
        self._number += 1
        self._write(f"[{self._number}/{self._total}] {active_run.run.name}: {active_run.note}")

    def waiting_for(self, run: StudyRun) -> None:
        """Say once that another process works on the run."""
        if self._waiting_for != run.name:
            self._waiting_for = run.name
            self._write(f"waiting for {run.name}: another process works on it")


def _print(line: str) -> None:
    print(line, flush=True)
