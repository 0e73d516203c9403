"""The results of each step, kept in one file."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext import files

DONE, FAILED, NOT_RUN, RUNNING = "done", "failed", "not run", "running"


class NotRun(Exception):
    """A step cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Context:
    """Where a step runs.

    Attributes:
        results: folder of the results.
        references: folder of the CPU's references for float32.
        scratch: folder for temporary files.
        rehearsal: the same code at tiny sizes on a CPU; no figure is a measurement.
    """

    results: Path
    references: Path
    scratch: Path
    rehearsal: bool


@dataclass
class Record:
    """One step's results.

    Attributes:
        figures: numbers by name; the page explains them.
        tables: Markdown by title.
        data: anything that the step needs to resume where it stopped.
    """

    file: Path
    step: str
    rehearsal: bool
    status: str = RUNNING
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    data: dict = field(default_factory=dict)

    def write(self) -> None:
        """Write the present state into the file."""
        everything = read(self.file)
        own = {name: value for name, value in vars(self).items() if name not in ("file", "step")}
        everything["steps"][self.step] = own
        files.write_json(self.file, everything)

    def end(self, status: str, reason: str = "", seconds: float = 0.0) -> None:
        """Record how the step ended."""
        self.status, self.reason, self.seconds = status, reason, round(seconds, 1)
        self.write()


def read(file: Path) -> dict:
    """The ``machine`` of the file and its ``steps`` by name; both empty if there is no file yet."""
    return files.read_json(file) if file.exists() else {"machine": {}, "steps": {}}


def of_step(file: Path, step: str, rehearsal: bool) -> Record:
    """The record of a step in the file; a new one if only one of the two is of a rehearsal."""
    known = read(file)["steps"].get(step)
    if known is None or known["rehearsal"] != rehearsal:
        return Record(file, step, rehearsal)
    return Record(file, step, **known)


def write_machine(file: Path, machine: dict) -> None:
    """Record this machine, its command and the date in the file."""
    everything = read(file)
    everything["machine"] = machine | {"date": time.strftime("%Y-%m-%d")}
    files.write_json(file, everything)
