"""How programs share the GPU: whether they fork, whether their kernels run side by side, and how many run at once."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_ext.study import forked, scheduler

PROBE = Path(__file__).with_name("probe.py")
LOAD = Path(__file__).with_name("load.py")
MPS = "nvidia-cuda-mps-control"
TRIAL_SECONDS = 3.0
READY_SECONDS = 20.0
"""Until a trial's programs have all reached the GPU."""
ENOUGH = 0.95
"""Of the most steps a second: the least number of programs that comes so far is taken."""


@contextlib.contextmanager
def side_by_side(results: Path) -> Iterator[tuple[Callable, bool]]:
    """What starts programs, and whether NVIDIA's Multi-Process Service (MPS) runs their kernels side by side.

    Programs are forked if forked processes can use the GPU. They cannot if an import in the process that they fork from
    has started CUDA; then each program imports everything itself. Without MPS, or where the GPU is out of reach with
    it, CUDA gives processes the GPU in turns.
    """
    with _mps() as has_mps:
        if has_mps and _reaches_gpu(results):
            yield forked.start_program, True
            return
    yield start_of_programs(results), False


def start_of_programs(results: Path) -> Callable:
    """:func:`.forked.start_program`, or the scheduler's if forked processes do not reach the GPU."""
    if _reaches_gpu(results):
        return forked.start_program
    print(f"forked processes cannot use the GPU ({results / 'probe.txt'}); programs start slowly instead", flush=True)
    return scheduler.start_program


def trial(numbers: Sequence[int], start: Callable, folder: Path) -> dict[int, float]:
    """Steps a second of a stand-in model, of all programs together, by the number of programs; 0 where one fails.

    Args:
        start: starts a program.
        folder: for the programs' output; made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {number: _steps_per_second(number, start, folder) for number in numbers}


def best_number(rates: dict[int, float]) -> int | None:
    """The least number of programs that comes near the most steps a second; None if nothing ran."""
    most = max(rates.values(), default=0.0)
    return min((number for number, rate in rates.items() if rate >= ENOUGH * most), default=None) if most else None


def _steps_per_second(number: int, start: Callable, folder: Path) -> float:
    begin, counts = folder / f"{number}.begin", [folder / f"{number}-{i}.count" for i in range(number)]
    for file in (begin, *counts, *(count.with_suffix(".ready") for count in counts)):
        file.unlink(missing_ok=True)
    with (folder / "lock").open("w") as lock:
        programs = []
        for count in counts:
            command = [sys.executable, str(LOAD), str(begin), str(TRIAL_SECONDS), str(count)]
            programs.append(start(command, folder / "log.txt", dict(os.environ), lock.fileno()))
        latest = time.monotonic() + READY_SECONDS
        while not all(count.with_suffix(".ready").exists() for count in counts):
            if time.monotonic() > latest or any(program.poll() is not None for program in programs):
                break
            time.sleep(0.02)
        begin.touch()
        latest = time.monotonic() + 2 * TRIAL_SECONDS + READY_SECONDS
        while any(program.poll() is None for program in programs) and time.monotonic() < latest:
            time.sleep(0.02)
    for program in programs:
        if program.poll() is None:
            program.send_signal(signal.SIGKILL)
    if not all(program.poll() == 0 for program in programs):
        return 0.0
    return sum(int(count.read_text()) for count in counts) / TRIAL_SECONDS


def _reaches_gpu(results: Path) -> bool:
    with (results / "probe.lock").open("w") as lock:
        command = [sys.executable, str(PROBE)]
        probe = forked.start_program(command, results / "probe.txt", dict(os.environ), lock.fileno())
        while probe.poll() is None:
            time.sleep(0.1)
    return probe.poll() == 0


@contextlib.contextmanager
def _mps() -> Iterator[bool]:
    """MPS for the processes that start inside; whether it runs."""
    if not shutil.which(MPS) or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield False
        return
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as folder:
        own = dict.fromkeys(("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"), folder)
        os.environ.update(own)
        try:
            yield _control(["-d"], "")
        finally:
            _control([], "quit\n")
            for name in own:
                del os.environ[name]


def _control(arguments: list[str], text: str) -> bool:
    try:
        command = [MPS, *arguments]
        done = subprocess.run(command, input=text, text=True, timeout=20, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
