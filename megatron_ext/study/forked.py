"""Programs of a study in processes that have imported torch and Megatron-Core already, which takes seconds of a core.

A server imports them once, touches no GPU, and forks a process for each program. So many short runs that share a GPU
start in a moment each.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver, process, resource_tracker
from multiprocessing.reduction import DupFd
from pathlib import Path

from megatron_ext.study import scheduler
from megatron_ext.study.steps import ROOT

PRELOADED = (
    "megatron_ext",  # first: it checks, or hides, Transformer Engine before Megatron-Core imports it
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron_ext.callbacks",
    "megatron_ext.evaluation.picture_scorer",
    "megatron_ext.generation.session",
    "megatron_ext.training.loop",
    "megatron_ext.training.run",
)
"""Modules that are only imported: nothing in them starts a device."""
LOST = 255
"""The exit code that multiprocessing gives a program whose server has ended before it."""
_HELD_BACK = (signal.SIGINT, signal.SIGTERM)
"""Signals to a whole process group or job, which must not end the server."""


class ForkedProgram:
    """A Python program in a forked process, in as much of ``subprocess.Popen`` as the scheduler needs.

    Args:
        command: the interpreter, the path of a script, its arguments.
        log: where its output is appended.
        environment: the whole of its environment.
        lock: a file descriptor that it inherits.

    Raises:
        EOFError, OSError: the server ends while it imports.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str], lock: int):
        arguments = (command[1:], log, environment, _Descriptor(lock))
        context = multiprocessing_context(PRELOADED, environment)
        self._process, self._log, self._is_lost = context.Process(target=run_program, args=arguments), log, False
        self._process.start()
        process._children.discard(self._process)  # whom multiprocessing waits for when this process ends

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs; :data:`LOST` if only the server knew."""
        code = self._process.exitcode
        if code == LOST and _lives(self._process.pid):
            self._is_lost = True
            return None
        if self._is_lost:
            self._is_lost = False
            with self._log.open("a") as stream:
                stream.write("the server that this program was forked from was lost, and its exit code with it\n")
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)


def start_program(
    command: list[str], log: Path, environment: dict[str, str], lock: int
) -> ForkedProgram | subprocess.Popen:
    """Start a program as :func:`.scheduler.start_program` does: forked, unless it needs a launcher (``-m``) or the
    server cannot import what it should."""
    is_forked = command[1] != "-m" and _can_fork(environment.get("OMP_NUM_THREADS"))
    return (ForkedProgram if is_forked else scheduler.start_program)(command, log, environment, lock)


def run_program(command: list[str], log: Path, environment: dict[str, str], lock: object = None) -> None:
    """Become the program ``command``: a script and its arguments. ``lock`` is only kept."""
    os.setsid()  # Ctrl-C reaches it through the process that started it alone
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    _become_fresh()
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without them


def multiprocessing_context(
    preloaded: Sequence[str], environment: Mapping[str, str]
) -> multiprocessing.context.BaseContext:
    """The context of a server that imports ``preloaded``; one that runs already stays as it is.

    Args:
        environment: ``OMP_NUM_THREADS`` in it is also the server's, because libraries read it when they are imported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    own = {name: environment[name] for name in ("OMP_NUM_THREADS",) if name in environment}
    # The server passes over modules that it does not find. It does not get sys.path.
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # torch.cuda.is_available() at import would otherwise start CUDA in the server, and break it in forked processes.
    own["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    resource_tracker.ensure_running()  # which would be started with the server, and unblock signals
    with _environment(own):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def accept_signals() -> None:
    """Let a forked process have the signals that do not reach the server."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)


@functools.cache
def _can_fork(threads: str | None) -> bool:
    """Whether the server lives after its imports; says once if not."""
    try:
        trial = multiprocessing_context(PRELOADED, {} if threads is None else {"OMP_NUM_THREADS": threads}).Process()
        trial.start()
    except (EOFError, OSError):
        print("programs cannot be forked, for the reason above; they start slowly instead", file=sys.stderr, flush=True)
        return False
    trial.join()
    return True


def _become_fresh() -> None:
    """Undo what this process shares with all others that were forked from the server."""
    accept_signals()
    # Exit functions of imported modules would remove the server's temporary folders. Programs register their own.
    atexit._clear()
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False
    weakref.finalize._registered_with_atexit = False
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) and (threads := os.environ.get("OMP_NUM_THREADS")):
        torch.set_num_threads(int(threads.split(",")[0]))  # one number for each level of nesting


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Descriptor:
    """An open file descriptor that a new process gets a copy of."""

    def __init__(self, number: int):
        self.number = number

    def __getstate__(self):
        return DupFd(self.number)

    def __setstate__(self, copy) -> None:
        self.number = copy.detach()
