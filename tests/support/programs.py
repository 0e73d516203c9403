"""Running the project's programs as a user runs them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON_PATH = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "benchmarks")))
"""What pytest's ``pythonpath`` setting is, for programs that import the same modules."""


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(processes: int) -> list[str]:
    """The beginning of a command that runs a program in this number of processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*launch, "--master_addr", "127.0.0.1", "--master_port", str(free_port())]


def run_program(command: list, check: bool = True, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Run a command from the repository's root; on an unexpected failure the test shows the end of the output.

    Args:
        environment: variables that are set besides those of this process.
    """
    completed = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert completed.returncode == 0 or not check, completed.stdout[-4000:]
    return completed


def start_program(command: list, **options) -> subprocess.Popen:
    """Start a command from the repository's root; options are those of ``subprocess.Popen``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **options)


def wait_until(condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 400) -> None:
    """Wait until a condition holds. The test fails after ``seconds``, or when ``process`` ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the program ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)
