"""``OUTPUT/starts.jsonl`` and ``OUTPUT/REFUSED``: what launchers that start a run again need to know.

Every start of a run is a line: time, world, the iteration it resumed from, and whether it is automatic (a restart by
torchrun, a requeued Slurm job). How it ended is another: ``ended`` (complete or stopped), or ``error`` and the rank.
All lines name their launch and Slurm job: only after a line of the same one a start is automatic. A run that has failed
in three starts at one iteration is given up. A configuration that was refused is refused again by every restart of the
same launch or job, at once. Other launches leave such a mark without harm.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.files import write_text
from megatron_ext.training.launcher import LAUNCH

MOST = 3
"""Starts at one iteration that may fail before the run is given up."""
LOST_PEER = ("closed by peer", "reset by peer", "Connection refused", "NCCL")
"""In errors that tell of another rank's end."""


class GivenUp(UserError):
    """The run has failed :data:`MOST` times in a row at one iteration."""


def check_refused(output: str | Path) -> None:
    """Call before anything is built.

    Raises:
        UserError: this launch, or this Slurm job, was refused before.
    """
    try:
        refused = json.loads((Path(output) / "REFUSED").read_text())
    except (OSError, ValueError):
        return
    if _starts_again(_launch(), refused["launch"]):
        raise UserError(refused["reason"])


def begin(output: str | Path) -> bool:
    """Whether this start is automatic: a launcher's or Slurm's, rather than a person's. A person's clears what an
    earlier one left. Call on one rank, once all have met and hold the folder: machines that have come later count fewer
    restarts.

    Raises:
        GivenUp: the start is automatic, and one too many.
    """
    records, own = read(output), _launch()
    automatic = bool(records) and _starts_again(own, records[-1]["launch"])
    if automatic:
        _check_failures([record for record in records if _related(own, record["launch"])])
    else:
        (Path(output) / "REFUSED").unlink(missing_ok=True)
    return automatic


def _check_failures(records: list[dict]) -> None:
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
        raise GivenUp(
            f"given up: {len(starts)} starts at iteration {starts[0]['iteration']} have failed; the first error: "
            f"{first_error}"
        )


def refuse(output: str | Path, reason: str) -> None:
    """Leave the mark that makes later starts of this launch or job end at once, where there may be any."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        write_text(Path(output) / "REFUSED", json.dumps({"reason": reason, "launch": _launch()}, indent=2) + "\n")


def record_start(output: str | Path, world: int, iteration: int, automatic: bool) -> None:
    """Call on one rank, when the run is built."""
    _append(output, world=world, iteration=iteration, automatic=automatic)


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
            records.append({"launch": {}, **json.loads(line)})
        except ValueError:
            continue
    return records


def _launch(environment: Mapping[str, str] = os.environ) -> dict:
    """What this process was started by, and how often that has started it again."""
    launch = {
        # Under torchrun itself, its process.
        "launch": environment.get(LAUNCH) or f"{socket.gethostname()} {os.getppid()}",
        "restarts": int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0),
    }
    if job := environment.get("SLURM_JOB_ID"):
        launch |= {"job": job, "requeues": int(environment.get("SLURM_RESTART_COUNT") or 0)}
    return launch


def _related(own: dict, before: dict) -> bool:
    """Whether two starts are of one launch, or of one Slurm job."""
    return any(own.get(key) == before.get(key) is not None for key in ("launch", "job"))


def _starts_again(own: dict, before: dict) -> bool:
    """Whether a launcher or Slurm has made one start out of the other's."""
    restarted = own["launch"] == before.get("launch") and own["restarts"] > 0
    requeued = own.get("job") == before.get("job") is not None and own["requeues"] > before["requeues"]
    return restarted or requeued


def _append(output: str | Path, **record) -> None:
    line = json.dumps({"time": round(time.time(), 1), **record, "launch": _launch()}) + "\n"
    # One write to a file opened for appending, so that lines of several ranks do not mix.
    descriptor = os.open(Path(output) / "starts.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
