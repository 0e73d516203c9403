"""``OUTPUT/LOCK``: one training run at a time in an output folder. Programs that only read the folder ignore it.

The file is made by a hard link, which is exclusive on network file systems too, and says who holds the folder. The
holder renews the file's time every 10 s; nobody compares clocks, a second run watches whether that time moves. A lock
is stale, and taken over, if

- its process ran here and is gone (the same boot, the same container; the same process id of another process counts);
- the launcher or Slurm has started the same job again, which ends the processes of the start before;
- its time has not moved for 60 s (its node is lost), of which the second run watches at least 20 s.

A holder that finds its lock taken over, because it was suspended for so long, ends at once. That is rank 0; the other
ranks end with their next message to it.
"""

import atexit
import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_ext.distributed import from_rank_zero
from megatron_ext.errors import UserError
from megatron_ext.training.launcher import IN_USE, LAUNCH

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


class OutputInUse(UserError):
    """Another run trains in the folder."""


def hold_output(output: str | Path) -> None:
    """Hold ``OUTPUT/LOCK`` on rank 0 until the program ends, however it ends. Collective.

    Raises:
        OutputInUse: another run holds it; names the host, process, job and times.
    """
    lock = OutputLock(Path(output))
    from_rank_zero(lock.acquire)
    atexit.register(lock.release)


class OutputLock:
    """The lock of one folder, held by this process between :meth:`acquire` and :meth:`release`.

    Args:
        environment: tells the job and how often it was started.
        say: prints a line.
    """

    def __init__(
        self,
        output: Path,
        environment: Mapping[str, str] = os.environ,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        heartbeat: float = HEARTBEAT_SECONDS,
        stale: float = STALE_SECONDS,
    ):
        self.path = output / "LOCK"
        self._say, self._heartbeat, self._stale = say, heartbeat, stale
        self._own = _identity(environment)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, and keep renewing it in a thread.

        Raises:
            OutputInUse: another run holds it.
            UserError: the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._take_over_if_stale()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        self._thread = threading.Thread(target=self._renew, name="output lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back; does nothing without it."""
        if self._thread and self._own["pid"] == os.getpid():  # not a forked process
            self._ended.set()
            self._thread.join()
            self._thread = None
            if _read(self.path).get("token") == self._own["token"]:
                self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        text = json.dumps(self._own, indent=2) + "\n"
        draft = self.path.with_name(f".LOCK.{self._own['token']}")
        try:
            draft.write_text(text)
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            return self._create_without_links(text)
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _create_without_links(self, text: str) -> bool:
        try:
            with open(self.path, "x") as stream:
                stream.write(text)
        except FileExistsError:
            return False
        return True

    def _take_over_if_stale(self) -> None:
        """Remove the lock that is there if it is stale.

        Raises:
            OutputInUse: it is not.
        """
        holder = _read(self.path)
        reason = _why_stale(holder, self._own) or self._watch(holder)
        if reason is None:
            raise OutputInUse(f"{self.path.parent}: {_described(holder, self.path)}")
        # Whoever renames first takes over. A lock that a third run has made meanwhile is put back.
        aside = self.path.with_name(f".LOCK.{self._own['token']}.stale")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if _read(aside).get("token") != holder.get("token"):
            os.rename(aside, self.path)
            return
        aside.unlink()
        self._say(f"{self.path}: taken over from {_process(holder)}, {reason}")

    def _watch(self, holder: dict) -> str | None:
        """Why the holder is lost, after waiting until its lock was renewed or has become stale; None: it is alive."""
        seen = _modified(self.path)
        # Also an old lock may be alive: the holder's file system may just have come back.
        seconds = min(self._stale, max(self._stale - self._age(), 2 * self._heartbeat))
        self._say(f"{self.path}: held by {_process(holder)}, waiting up to {seconds:.0f} s for a sign of life")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(0.5, self._heartbeat / 4))
            if (now := _modified(self.path)) is None:
                return "which has ended"
            if now != seen:
                return None
        return f"which gave no sign of life for {self._stale:.0f} s"

    def _age(self) -> float:
        """Seconds since the lock was renewed, by the clock of the file system."""
        probe = self.path.with_name(f".LOCK.{self._own['token']}.probe")
        probe.write_text("")
        now, then = _modified(probe), _modified(self.path)
        probe.unlink(missing_ok=True)
        return (now - then) / 1e9 if now and then else 0.0

    def _renew(self) -> None:
        while not self._ended.wait(self._heartbeat):
            with contextlib.suppress(OSError, ValueError):  # a file system that is away for a while
                self._renew_once()

    def _renew_once(self) -> None:
        try:
            holder = json.loads(self.path.read_text())
        except FileNotFoundError:  # somebody removed it
            self._create()
            return
        if holder.get("token") != self._own["token"]:
            self._say(f"{self.path}: taken over by {_process(holder)}, because this run was suspended; it ends")
            os._exit(IN_USE)
        os.utime(self.path)


def _identity(environment: Mapping[str, str]) -> dict:
    """Who this process is."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "job": environment.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "process_started": _process_start(pid),
        "place": f"{_text('/proc/sys/kernel/random/boot_id')} {os.readlink('/proc/self/ns/pid')}",
        # Of one job, a later start has the greater number; earlier ones are ended first.
        "starts": [
            [name, environment[name], int(environment.get(count) or 0)]
            for name, count in (
                ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
                (LAUNCH, "TORCHELASTIC_RESTART_COUNT"),
            )
            if environment.get(name)
        ],
        "token": secrets.token_hex(8),
    }


def _why_stale(holder: dict, own: dict) -> str | None:
    """Why the process ``holder`` cannot be alive, as far as that is known without waiting."""
    if holder.get("place") == own["place"] and "pid" in holder:
        if _process_start(holder["pid"]) != holder["process_started"]:
            return "which has ended"
        return None
    before = {(name, value): count for name, value, count in holder.get("starts", ())}
    for name, value, count in own["starts"]:
        if count > before.get((name, value), count):
            return "an earlier start of this job"
    return None


def _process_start(pid: int) -> str | None:
    """When a process started, in ticks since boot; None: there is none, or it has ended and its parent not looked."""
    stat = _text(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything
    return None if not fields or fields[0] in "ZX" else fields[19]


def _process(holder: dict) -> str:
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}{job}"


def _described(holder: dict, path: Path) -> str:
    renewed = _modified(path)
    last = f", last sign of life {time.strftime('%H:%M:%S', time.localtime(renewed / 1e9))}" if renewed else ""
    return (
        f"another run trains here ({_process(holder)}, since {holder.get('since', '?')}{last}); "
        "wait for it, stop it, or choose another output"
    )


def _modified(path: Path) -> int | None:
    """Nanoseconds. The file is opened: a network file system then asks its server, not its cache."""
    try:
        with open(path) as stream:
            return os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _read(path: Path) -> dict:
    """What a lock says; empty if it is gone or cannot be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
