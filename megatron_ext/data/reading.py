"""Which file this process is reading, visible from outside: the process may be stopped in the middle of it.

The path is in anonymous memory that other processes of the same user find under ``/proc/PID/fd``.
"""

import contextlib
import os
from pathlib import Path

_NAME = "file-being-read"
_LENGTH = 512
_descriptor: int | None = None
_owner: int | None = None


def note(path: str | Path | None) -> None:
    """Note the file that is read next; None: reading is done."""
    global _descriptor, _owner
    if _owner != os.getpid():  # also in a forked process, which must not write into its parent's
        _descriptor, _owner = os.memfd_create(_NAME), os.getpid()
    os.pwrite(_descriptor, os.fsencode(path or "")[:_LENGTH].ljust(_LENGTH, b"\0"), 0)


def of(pid: int) -> str | None:
    """The file that a process is reading; None: none, or it cannot be seen."""
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):  # closed by now, such as this listing of the process itself
                file = f"{folder}/{name}"
                if _NAME in os.readlink(file):
                    with open(file, "rb") as stream:
                        return os.fsdecode(stream.read(_LENGTH).rstrip(b"\0")) or None
    return None
