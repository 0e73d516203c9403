"""``OUTPUT/starts.jsonl`` and ``OUTPUT/REFUSED``: what launchers that start a run again need to know.

Every start of a run is a line: time, world, the iteration it resumed from, and whether it is automatic (a restart by
torchrun, a requeued Slurm job). How it ended is another: ``ended`` (complete or stopped), or ``error`` and the rank. A
run that has failed in three starts at one iteration is given up. A configuration that was refused is refused again by
every restart, at once.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.files import write_text

MOST = 3
"""Starts at one iteration that may fail before the run is given up."""
LOST_PEER = ("closed by peer", "reset by peer", "Connection refused", "NCCL")
"""In errors that tell of another rank's end."""


def is_automatic(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process again, rather than a person for the first time."""
    counts = (environment.get(name) or "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(int(count) > 0 for count in counts)


def check(output: str | Path) -> None:
    """Call before anything is built. A start by a person clears what an earlier one left.

    Raises:
        UserError: the start is automatic, and the run was refused before or has failed :data:`MOST` times in a row at
            the same iteration.
    """
    refused = Path(output) / "REFUSED"
    if not is_automatic():
        refused.unlink(missing_ok=True)
        return
    if refused.is_file():
        raise UserError(refused.read_text().strip())
    records = read(output)
    first = max((i for i, r in enumerate(records) if "world" in r and not r["automatic"]), default=0)
    latest: list[dict] = []  # starts since the last one that ended well, and their errors
    for record in records[first:]:
        if "ended" in record or ("world" in record and latest and record["iteration"] != latest[0]["iteration"]):
            latest.clear()
        if "ended" not in record:
            latest.append(record)
    starts = [record for record in latest if "world" in record]
    if len(starts) >= MOST:
        errors = [f"rank {record['rank']}: {record['error']}" for record in latest if "error" in record]
        own = [error for error in errors if not any(text in error for text in LOST_PEER)]
        first_error = [*own, *errors, "no rank could say why (killed?)"][0]
        raise UserError(
            f"given up: {len(starts)} starts at iteration {starts[0]['iteration']} have failed; the first error: "
            f"{first_error}"
        )


def refuse(output: str | Path, reason: str) -> None:
    """Leave the mark that makes restarts by a launcher end at once, where there may be any."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        write_text(Path(output) / "REFUSED", reason + "\n")


def record_start(output: str | Path, world: int, iteration: int) -> None:
    """Call on one rank, when the run is built."""
    _append(output, world=world, iteration=iteration, automatic=is_automatic())


def record_end(output: str | Path, iteration: int, complete: bool) -> None:
    """Call on one rank, when training ended as it should: at its last iteration, or because it was told to stop."""
    _append(output, ended="complete" if complete else "stopped", iteration=iteration)


def record_error(output: str | Path, rank: int, error: BaseException) -> None:
    """Call on every rank that fails; it must not hide the error, so it never fails itself."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    with contextlib.suppress(OSError):
        _append(output, rank=rank, error=str(error) if isinstance(error, UserError) else text)


def read(output: str | Path) -> list[dict]:
    """The lines of ``starts.jsonl``, without ones that a killed process has not finished."""
    file = Path(output) / "starts.jsonl"
    records = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _append(output: str | Path, **record) -> None:
    line = json.dumps({"time": round(time.time(), 1), **record}) + "\n"
    # One write to a file opened for appending, so that lines of several ranks do not mix.
    descriptor = os.open(Path(output) / "starts.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
