"""Running the project's programs as a user runs them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launcher(processes: int) -> list[str]:
    """The beginning of a command that runs a program in so many processes."""
    if processes == 1:
        return [sys.executable]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*launch, "--master_addr", "127.0.0.1", "--master_port", str(port)]


def run_program(command: list, check: bool = True) -> subprocess.CompletedProcess:
    """Run from the repository's root; on an unexpected failure the test shows the end of the output."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 or not check, done.stdout[-4000:]
    return done
