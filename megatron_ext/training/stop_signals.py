"""The signals that tell a run to stop, remembered from the first moment of the process.

Importing Megatron-Core, joining the other ranks and loading a checkpoint can take minutes. SIGUSR1 that arrives
meanwhile, shortly before a Slurm job ends, must neither kill the process nor be forgotten: :func:`remember` keeps it
until :class:`~megatron_ext.training.lifecycle.Lifecycle` takes over. Slurm and the launch script repeat signals: after
the first, more are ignored, and :func:`ignore` does the same when training has ended. Imports nothing heavy.
"""

import os
import signal
import sys
from multiprocessing import resource_tracker

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_received: list[int] = []
_training = False


def remember() -> None:
    """Call first in a program that trains.

    From now on SIGUSR1 is remembered; it waits until :func:`admit`. SIGTERM ends the process at once, as there is
    nothing to save yet: with code 0 if it is alone, since it has done what it was told to, and with 143 among other
    ranks, whose launcher must notice. Ctrl-C keeps its meaning.
    """
    signal.signal(signal.SIGUSR1, _note)
    signal.signal(signal.SIGTERM, _end)
    # The launcher blocks these signals in the processes it starts, until a handler is there. SIGUSR1 stays blocked: it
    # would interrupt torch's connections to other ranks, which then print stacks.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
    # Slurm signals every process of a job. Python's tracker of shared memory ignores SIGINT and SIGTERM; SIGUSR1 would
    # kill it and each rank would say so with a traceback. What it is started with blocked stays blocked there.
    if signal.SIGUSR1 not in resource_tracker._IGNORED_SIGNALS:  # checked against Python 3.11 to 3.13
        resource_tracker._IGNORED_SIGNALS += (signal.SIGUSR1,)


def admit() -> None:
    """Call when the ranks have met."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


def received() -> list[int]:
    """The signals that have arrived since :func:`remember`."""
    return list(_received)


def taken_over() -> None:
    """Call when another handler is in place: from then on, what arrives here arrives after training."""
    global _training
    _training = True


def ignore() -> None:
    """Call when training has ended. At its exit Python restores the default of handlers that it knows, which would kill
    the process, but not of ignored signals."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame) -> None:
    signal.signal(number, signal.SIG_IGN)  # another one would only interrupt system calls
    _received.append(number)


def _end(number: int, frame) -> None:
    if _training:
        return
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone:
        print("stopped before training began: received SIGTERM", file=sys.stderr, flush=True)
    os._exit(0 if alone else 128 + number)
