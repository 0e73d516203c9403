"""torchrun for runs that are told to stop: one process on each machine that starts its ranks, and starts them again.

    python -m megatron_ext.training.launcher --standalone --nproc_per_node 8 --max-restarts 3 \
        pretrain_unified.py --config my.yaml

Takes torchrun's arguments. What is different:

- SIGUSR1, SIGTERM and SIGINT are passed on to the ranks, which finish their step, save and exit with code 0; then so
  does this process. torchrun would give them a time limit and end with a traceback and an error code. No moment is too
  early: signals are blocked in a rank until it can handle them. A second Ctrl-C, at least a second later, ends all.
- A failure is one line that names the rank that failed first, and the exit code is that rank's. Ranks that end with
  code 2 (the configuration is refused) or 3 (another run trains in the output folder) are not started again. Code 75
  is a lost peer, also another machine that does not come.
- Ranks can tell this launch from any other (:data:`LAUNCH`), and how many machines it may have (:data:`MACHINES`).
- Ranks that start again meet at a new store. torch 2.13 would keep the old one, with addresses of ranks that are gone.
"""

import argparse
import contextlib
import os
import secrets
import signal
import sys
import threading
import time

from megatron_ext.training.stop_signals import SIGNALS

SECONDS_WITHOUT_RANKS = 60
"""A launcher that was told to stop and has had no ranks for so long waits for other machines, and ends."""

REFUSED, IN_USE, LOST_PEER = 2, 3, 75
"""Exit codes of a rank: the configuration is refused; another run trains in the folder; a hang, or a lost peer."""
LAUNCH = "MEGATRON_EXT_LAUNCH"
"""Environment variable of the ranks: the same in all starts of one launch, and no other launch on one machine has it.
Launches on several machines differ by the place where they meet, at which there can be one at a time."""
MACHINES = "MEGATRON_EXT_MACHINES"
"""Environment variable of the ranks: the most machines of this launch."""


def main() -> None:
    # Before any thread starts: signals are then blocked in all threads, and one thread waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # It asks ranks for their stacks (training/watch.py). Slurm sends it to this process too, and to ranks not ready.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    stop = _Stop()
    threading.Thread(target=stop.watch, daemon=True).start()
    # Imported late: it takes seconds, and signals must be blocked from the start.
    from torch.distributed import launcher, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    arguments = run.parse_args(sys.argv[1:])
    _describe_launch(arguments)
    launcher.api.LocalElasticAgent = _agent(launcher.api.LocalElasticAgent)
    try:
        run.run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if stop.told and failure.exitcode in (-signal.SIGUSR1, -signal.SIGTERM, 128 + signal.SIGTERM):
            sys.exit(0)  # told to stop before training began
        print(f"launcher: rank {rank} failed first, {_describe(failure)}", file=sys.stderr, flush=True)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except RendezvousError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"launcher: cannot meet the other machines: {reason}", file=sys.stderr, flush=True)
        # Closed: another launcher has ended for good, and says why.
        sys.exit(1 if isinstance(error, RendezvousClosedError) else LOST_PEER)


def _describe_launch(arguments: argparse.Namespace) -> None:
    """Set the variables that ranks inherit."""
    most = "1" if arguments.standalone else str(arguments.nnodes).rpartition(":")[2]
    meeting = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
    os.environ[MACHINES] = most
    os.environ[LAUNCH] = secrets.token_hex(8) if most == "1" else f"{arguments.rdzv_id} at {meeting}"


def _agent(base: type) -> type:
    """torchrun's agent, which does not start ranks again whose exit code says that it cannot help."""

    class Agent(base):
        def _monitor_workers(self, worker_group):
            result = super()._monitor_workers(worker_group)
            if any(failure.exitcode in (REFUSED, IN_USE) for failure in (result.failures or {}).values()):
                self._remaining_restarts = 0
            return result

    return Agent


class _Stop:
    """Passes signals on to the ranks of this machine, each rank once, also to ranks that start later."""

    def __init__(self):
        self.told = 0
        self._at = 0.0

    def watch(self) -> None:
        """Wait for signals, for as long as the process lives."""
        passed_on: set[int] = set()
        seen_at = time.monotonic()
        while True:
            arrived = signal.sigtimedwait(SIGNALS, 0.5)
            if arrived and arrived.si_signo == signal.SIGINT and self.told == signal.SIGINT and self._age() >= 1:
                self._interrupt()
            if arrived and not self.told:
                self.told, self._at = arrived.si_signo, time.monotonic()
            if not self.told:
                continue
            ranks = _ranks()
            for process in ranks:
                if process.pid not in passed_on:
                    passed_on.add(process.pid)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, self.told)
            seen_at = time.monotonic() if ranks else max(seen_at, self._at)
            if time.monotonic() - seen_at > SECONDS_WITHOUT_RANKS:
                os._exit(0)

    def _age(self) -> float:
        return time.monotonic() - self._at

    def _interrupt(self) -> None:
        for process in _ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)


def _ranks() -> list:
    """The ranks that this process has started and that are running (``psutil.Process``)."""
    import psutil  # late: signals must be blocked before

    ranks = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and "RANK" in process.environ():
                ranks.append(process)
    return ranks


def _describe(failure) -> str:
    """How a rank ended: its signal, or its exit code and the last line of its error."""
    if failure.exitcode < 0:
        return f"by {signal.Signals(-failure.exitcode).name}"
    message = failure.message
    if isinstance(message, dict):
        message = message.get("message", "")
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    said = f": {lines[-1]}" if lines and not lines[-1].startswith("To enable traceback") else ""
    return f"with exit code {failure.exitcode}{said}"


if __name__ == "__main__":
    main()
