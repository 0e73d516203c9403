"""What is known of each step, kept in one file."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext import files

DONE, FAILED, NOT_RUN, RUNNING = "done", "failed", "not run", "running"


class NotRun(Exception):
    """A step cannot be had on this machine; says why."""


@dataclass(frozen=True)
class Context:
    """Where a step runs.

    Attributes:
        results: folder of the results.
        references: folder of the CPU's references for float32.
        scratch: folder for what is not kept.
        rehearsal: the same code at tiny sizes, on a CPU; nothing is a measurement.
    """

    results: Path
    references: Path
    scratch: Path
    rehearsal: bool


@dataclass
class Record:
    """One step's results.

    Attributes:
        figures: numbers by name; the page knows what they mean.
        tables: Markdown by title.
        data: whatever the step needs to go on where it was stopped.
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
        """Put it into the file as it stands."""
        everything = read(self.file)
        own = {name: value for name, value in vars(self).items() if name not in ("file", "step")}
        everything["steps"][self.step] = own
        files.write_json(self.file, everything)

    def end(self, status: str, reason: str = "", seconds: float = 0.0) -> None:
        """Say how the step ended."""
        self.status, self.reason, self.seconds = status, reason, round(seconds, 1)
        self.write()


def read(file: Path) -> dict:
    """The file's ``machine`` and its ``steps`` by name; both empty where there is no file yet."""
    return files.read_json(file) if file.exists() else {"machine": {}, "steps": {}}


def of_step(file: Path, step: str, rehearsal: bool) -> Record:
    """What the file knows of a step. A rehearsal's results are no start for measurements, nor the other way round."""
    known = read(file)["steps"].get(step)
    if known is None or known["rehearsal"] != rehearsal:
        return Record(file, step, rehearsal)
    return Record(file, step, **known)


def write_machine(file: Path, machine: dict) -> None:
    """Say in the file what machine this is, when, and by which command."""
    everything = read(file)
    everything["machine"] = machine | {"date": time.strftime("%Y-%m-%d")}
    files.write_json(file, everything)
