"""Programs of a study in processes that have imported torch and Megatron-Core already, which takes seconds of a core.

A server imports them once, touches no GPU, and forks a process for each program. So many short runs that share a GPU
start in a moment each.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing.reduction import DupFd
from pathlib import Path

from megatron_ext.study import scheduler

PRELOADED = (
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron_ext.callbacks",
    "megatron_ext.evaluation.picture_scorer",
    "megatron_ext.generation.session",
    "megatron_ext.training.loop",
    "megatron_ext.training.run",
)
"""Modules that are only imported: nothing in them starts a thread or a device."""


class ForkedProgram:
    """A Python program in a forked process, in as much of ``subprocess.Popen`` as the scheduler needs.

    Args:
        command: the interpreter, the path of a script, its arguments.
        log: where its output is appended.
        environment: the whole of its environment.
        lock: a file descriptor that it inherits; None: none.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str], lock: int | None = None):
        inherited = None if lock is None else _Descriptor(lock)
        arguments = (command[1:], log, environment, inherited)
        self._process = multiprocessing_context().Process(target=run_program, args=arguments)
        self._process.start()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._process.pid, number)


def start_program(
    command: list[str], log: Path, environment: dict[str, str], lock: int | None = None
) -> ForkedProgram | subprocess.Popen:
    """Start a program as :func:`.scheduler.start_program` does: forked, unless it needs a launcher (``-m``)."""
    start = scheduler.start_program if command[1] == "-m" else ForkedProgram
    return start(command, log, environment, lock)


def run_program(command: list[str], log: Path, environment: dict[str, str], lock: object = None) -> None:
    """Become the program ``command``: a script and its arguments. ``lock`` is only kept."""
    os.setsid()  # Ctrl-C reaches it through the process that started it alone
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    import torch

    if threads := environment.get("OMP_NUM_THREADS"):  # which torch has read already
        torch.set_num_threads(int(threads))
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def multiprocessing_context() -> multiprocessing.context.BaseContext:
    """The context whose server has imported :data:`PRELOADED`."""
    # torch.cuda.is_available() at import would otherwise start CUDA in the server, and break it in forked processes.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


class _Descriptor:
    """An open file descriptor that a new process gets a copy of."""

    def __init__(self, number: int):
        self.number = number

    def __getstate__(self):
        return DupFd(self.number)

    def __setstate__(self, copy) -> None:
        self.number = copy.detach()
