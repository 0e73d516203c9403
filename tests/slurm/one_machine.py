"""A Slurm of one node on this machine, in a folder: its daemons run under root, without munge and without accounting.

python tests/slurm/one_machine.py        says whether it can be started here; exit code 0 or 1
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SLOWER = int(os.environ.get("SLURM_TEST_SLOWER", 1))
"""Times of the tests are longer by this factor, for a busy machine."""
INSTALL = os.environ.get("SLURM_TEST_INSTALL") == "1"
"""Whether Slurm may be installed."""
PREFIXES = ("SLURM_", "SBATCH_", "SALLOC_", "SRUN_", "SCANCEL_", "SQUEUE_", "SINFO_")
"""Of variables that Slurm's commands read. Those of another Slurm mean nothing here."""
CPUS = 16
"""Of the node, whatever the machine has: jobs of a test should start at once."""
CONFIG = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
MpiDefault=none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
InactiveLimit=0
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=9
"""


class Unavailable(Exception):
    """Why there can be no Slurm here, in one line."""


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """Slurm's commands, called inside, talk to a Slurm that lives in ``folder``.

    Raises:
        Unavailable: it cannot be installed or does not start.
    """
    install()
    host = socket.gethostname().split(".")[0]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, ports=_free_ports(2), cpus=CPUS))
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(PREFIXES)}
    os.environ["SLURM_CONF"] = str(config)
    daemons = []
    try:
        for command in (["slurmctld", "-D", "-f", config], ["slurmd", "-D", "-f", config]):
            with (folder / f"{command[0]}.out").open("w") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=_end_with_parent))
        _wait_until_idle(daemons, folder)
        yield
    finally:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            for options in ([], ["--signal=KILL", "--full"]):
                subprocess.run(["scancel", *options, "--user", "root"], timeout=10, capture_output=True)
                _wait_for_empty_queue()
        for daemon in reversed(daemons):
            _end(daemon)
        os.environ.pop("SLURM_CONF")
        os.environ.update(before)


def install() -> None:
    """Install Slurm with apt-get unless it is there.

    Raises:
        Unavailable: this is not root, apt-get is missing or fails, or nobody allowed it.
    """
    if os.geteuid():
        raise Unavailable("not root")
    if all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "srun", "scontrol"))):
        return
    if not INSTALL or not shutil.which("apt-get"):
        raise Unavailable("none installed; as root, with apt-get, SLURM_TEST_INSTALL=1 installs one")
    package = ["install", "-y", "--no-install-recommends", "slurm-wlm"]
    _apt_get("update", seconds=60, must=False)
    _apt_get(*package, "--download-only", seconds=120)
    _apt_get(*package, "--no-download", seconds=180, end=False)
    if not shutil.which("slurmctld"):
        raise Unavailable("apt-get installed no slurmctld")


def _apt_get(*arguments: str, seconds: float, must: bool = True, end: bool = True) -> None:
    """Run apt-get; with ``end`` false it goes on in its own time: a package half unpacked breaks the next."""
    options = ["-o", "DPkg::Lock::Timeout=10", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=15"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            ["apt-get", *options, *arguments],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,  # no signal for the tests ends it
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            if end:
                _end(process)
            raise Unavailable(f"apt-get {arguments[0]} takes longer than {seconds:.0f} s") from None
        if code and must:
            said.seek(0)
            raise Unavailable(f"apt-get {arguments[0]}: {(said.read().strip().splitlines() or ['failed'])[-1]}")


def _wait_until_idle(daemons: list[subprocess.Popen], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for daemon in daemons:
            if daemon.poll() is not None:
                name = Path(daemon.args[0]).name
                said = [*(folder / f"{name}.out").read_text().strip().splitlines(), "no message"][-2:][0]
                raise Unavailable(f"{name} ended with code {daemon.returncode}: {said}")
        try:
            state = subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True, timeout=10).stdout
        except subprocess.TimeoutExpired:
            continue
        if "idle" in state:
            return
        time.sleep(0.5)
    raise Unavailable("the node did not become idle within 60 s")


def _wait_for_empty_queue() -> None:
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        queue = subprocess.run(["squeue", "-h"], capture_output=True, text=True, timeout=10)
        if queue.returncode or not queue.stdout.strip():
            return
        time.sleep(0.5)


def _end_with_parent() -> None:
    """In a new daemon: a session of its own, and SIGTERM when the process that has started it ends, however it does."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _end(daemon: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(daemon.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(10)
            return


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="slurm-") as scratch:
        try:
            with running(Path(scratch)):
                pass
        except Unavailable as reason:
            print(f"no Slurm here: {reason}")
            sys.exit(1)
    print("Slurm starts here")
