"""The project's Python programs in processes of the fork server, where importing Megatron-Core costs nothing.

For tests of what a program does. Tests of how it starts and of torchrun use :mod:`support.programs`,
which starts it as a user does.
"""

import os
import subprocess
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from megatron_ext.study import forked
from support import fork_server
from support.programs import ROOT


def run_forked(
    command: list, processes: int | None = None, check: bool = True, seconds: float = 600
) -> subprocess.CompletedProcess:
    """Run a script with its arguments; a rank that ends with an error ends the others.

    Args:
        command: the script's path in the repository, and arguments.
        processes: ranks, started as torchrun starts them; None: a process without a launcher.
        check: the test fails, and shows the end of the output, unless every exit code is 0.
        seconds: until the test fails.

    Returns:
        The first exit code that is not 0, and what the ranks printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        output.touch()
        # Ranks meet at the launcher's store.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes else None
        environments = [_environment(rank, processes, store) for rank in range(processes)] if store else [{}]
        ranks = [_start(command, output, environment) for environment in environments]
        code = _wait_for(ranks, seconds)
        text = output.read_text()
    assert code == 0 or not check, text[-4000:]
    return subprocess.CompletedProcess(command, code, text)


def _start(command: list, output: Path, environment: dict[str, str]) -> BaseProcess:
    process = fork_server.context().Process(target=_program, args=(list(map(str, command)), output, environment))
    process.start()
    return process


def _environment(rank: int, processes: int, store: dist.TCPStore) -> dict[str, str]:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    variables |= {"MASTER_ADDR": store.host, "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in variables.items()}


def _wait_for(ranks: list[BaseProcess], seconds: float) -> int:
    deadline = time.monotonic() + seconds
    code, running = 0, list(ranks)
    try:
        while running and not code:
            ended = wait([rank.sentinel for rank in running], deadline - time.monotonic())
            assert ended, f"not ready after {seconds:.0f} s"
            code = next((rank.exitcode for rank in running if rank.exitcode), 0)
            running = [rank for rank in running if rank.is_alive()]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return code


def _program(command: list[str], output: Path, environment: dict[str, str]) -> None:
    os.chdir(ROOT)
    forked.run_program(command, output, {**os.environ, **environment})
