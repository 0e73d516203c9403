"""What fault cases are made of: a registry, a tiny run that is started as a user starts one, and its ranks' processes.

A case is a function of an empty folder that injects a fault, checks what must hold, and says in a few words what
happened::

    @case(1, "SIGKILL to a rank during training", expected="torchrun restarts; losses are those of an undisturbed run")
    def killed_rank(folder: Path) -> str:
        run = start(folder / "run", "training.iterations=6", restarts=1)
        run.wait_for_iteration(2)
        os.kill(run.ranks()[1].pid, signal.SIGKILL)
        expect(run.wait() == 0, run.tail())
        expect(losses(folder / "run") == undisturbed("training.iterations=6"), "other losses")
        return "restarted, same losses"

Faults inside of a rank are callbacks of :mod:`fault_cases.injections` (``callbacks=[...]``), never code of the trainer.
"""

import atexit
import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from gpu.tiny_run import write_config
from megatron_ext.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
WAIT = 240.0 * float(os.environ.get("FAULTS_SLOWER", 1))
"""Seconds that a program may take before a case fails; ``FAULTS_SLOWER`` is a factor for a busy machine."""
SETTINGS = (
    "training.precision=float32",
    "training.iterations=6",
    "checkpoint.interval=2",
    "checkpoint.keep=0",
    "logging.tensorboard=false",
)
"""Of every run, after the tiny configuration: 2 layers, rows of 128 tokens, 4 rows a step."""


class Missed(Exception):
    """What a case expects did not happen."""


@dataclass(frozen=True)
class Case:
    number: int
    title: str
    expected: str
    function: Callable[[Path], str]


CASES: dict[int, Case] = {}


def case(number: int, title: str, *, expected: str) -> Callable:
    """Register a function as the case of this number."""

    def register(function: Callable[[Path], str]) -> Callable[[Path], str]:
        if number in CASES:
            raise ValueError(f"two cases have number {number}")
        CASES[number] = Case(number, title, expected, function)
        return function

    return register


def expect(condition: object, message: str) -> None:
    """The case fails with this message unless the condition holds."""
    if not condition:
        raise Missed(message)


@functools.cache
def material() -> Path:
    """The configuration of the tiny run, with its data set and vocabulary, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_config(folder, rehearsal=True)


class Program:
    """A started command in a session of its own; its output is in a file.

    Args:
        output: the output folder of the run that the command trains.
    """

    def __init__(self, command: Sequence, output: Path, log: Path, **environment: str):
        self.output, self.log = output, log
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
        self.started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as stream:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _started.append(self)

    def wait(self, seconds: float = WAIT) -> int:
        """The exit code; the case fails if the command runs longer than ``seconds``."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Missed(f"still running after {seconds:.0f} s: {self.tail()}") from None

    def wait_until(self, condition: Callable[[], object], seconds: float = WAIT) -> float:
        """Wait for a condition while the command runs. Returns the seconds waited."""
        begun = time.monotonic()
        while not condition():
            expect(self.process.poll() is None, f"ended with code {self.process.poll()}: {self.tail()}")
            expect(time.monotonic() - begun < seconds, f"waited {seconds:.0f} s in vain: {self.tail()}")
            time.sleep(0.02)
        return time.monotonic() - begun

    def wait_for_iteration(self, iteration: int) -> None:
        """Wait until the iteration is logged."""
        self.wait_until(lambda: any(m["iteration"] >= iteration for m in metrics(self.output)))

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, in the order of their ranks."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                rank, parent = process.environ().get("RANK"), process.parent()
                if rank is not None and (parent is None or "RANK" not in parent.environ()):
                    found[int(rank)] = process
        return [found[rank] for rank in sorted(found)]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 8) -> str:
        return " | ".join(line for line in self.text().splitlines()[-lines:] if line.strip())

    def line(self, *parts: str) -> str:
        """The last line of the output with all of these parts; the case fails if there is none."""
        found = [line for line in self.text().splitlines() if all(part in line for part in parts)]
        expect(found, f"no line with {' and '.join(map(repr, parts))}: {self.tail()}")
        return found[-1].strip()

    def kill(self) -> None:
        """SIGKILL to the command and everything that it started."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


_started: list[Program] = []


def end_all() -> None:
    """End what the cases have started so far."""
    for program in _started:
        program.kill()
    _started.clear()


def train_command(output: Path, *overrides: str) -> list:
    """The training program with its arguments, without a launcher."""
    return ["pretrain_unified.py", "--config", material(), f"output={output}", *SETTINGS, *overrides]


def launcher(processes: int, *options) -> list:
    """The beginning of a command under the launcher; ``options`` are torchrun's."""
    return [sys.executable, "-m", "megatron_ext.training.launcher", "--nproc_per_node", processes, *options]


def start(
    output: Path, *overrides: str, processes: int = 2, restarts: int = 0, options: Sequence = (), **environment: str
) -> Program:
    """Start the tiny run under the launcher (torchrun) on this machine.

    Args:
        overrides: settings over :data:`SETTINGS`.
        restarts: how often torchrun starts all ranks again after one has failed.
        options: more of torchrun's, instead of ``--standalone`` with a rendezvous of its own.
        environment: variables, such as those of :mod:`fault_cases.injections`.
    """
    launch = launcher(processes, *(options or ["--standalone"]), "--max-restarts", restarts)
    log = output.with_name(output.name + ".log")
    return Program([*launch, *train_command(output, *overrides)], output, log, **environment)


def metrics(output: Path) -> list[dict]:
    """The logged iterations of a run; empty before the first."""
    file = output / "metrics.jsonl"
    return read_metrics(file) if file.exists() else []


def losses(output: Path) -> list[float]:
    """The loss of every iteration, in order; the case fails if one is missing."""
    records = metrics(output)
    expect([m["iteration"] for m in records] == list(range(1, len(records) + 1)), f"{output.name}: iterations missing")
    return [m["loss"] for m in records]


@functools.cache
def undisturbed(*overrides: str, processes: int = 2) -> list[float]:
    """The losses of a run with these settings to which nothing happens; made once."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        run = start(Path(folder) / "undisturbed", *overrides, processes=processes)
        expect(run.wait() == 0, f"the undisturbed run failed: {run.tail()}")
        return losses(run.output)


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
