"""The state of a run, read from its folder: its configuration, whether a process works on it, its progress.

::

    RUN/run.yaml       its configuration, written before anything else
    RUN/data.json      its data sets, and the checksums of their metadata
    RUN/.lock          held by the process that works on the run and by the programs it started
    RUN/log.txt        the output of those programs
    RUN/failed.json    the failure of the last attempt, until the next attempt
    RUN/result.json    written last: the run is complete
"""

import fcntl
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.files import read_json, write_json, write_text
from megatron_ext.study.grid import StudyRun, metadata_checksum
from megatron_ext.training.metrics import read_metrics

_FREE = ("output", "parallel", "checkpoint", "logging", "lifecycle", "evaluation")
"""Sections that may change before a run ends: they change its results by no more than rounding."""

_RANK = re.compile(r"^\[\w+\]:\s*")  # torchrun's prefix to the output of a rank
_ERROR = re.compile(r"^\w+\.py: \S")  # the one line of a program's error
_DIVERGED = re.compile(r"\d+ bad steps? in (?:a row|all), 'bad_steps\.")  # that of training.bad_steps


@dataclass(frozen=True)
class State:
    """``kind`` is finished, running, failed, diverged (a trial alone), changed, trained (not evaluated), stopped or
    waiting."""

    kind: str
    iteration: int = 0
    note: str = ""


def of(run: StudyRun, evaluation: dict) -> State:
    """The state of a run.

    Args:
        evaluation: the run's evaluation, from :func:`~.steps.fingerprint`.
    """
    iteration = trained_iterations(run)
    if difference := changed(run):
        return State("changed", iteration, difference)
    if _result(run, evaluation):
        return State("finished", run.iterations)
    if locked(run):
        return State("running", iteration)
    if (file := run.folder / "failed.json").is_file():
        failure = read_json(file)
        kind = "diverged" if _has_diverged(run) else "failed"
        return State(kind, iteration, f"{failure['step']}: {failure['error']}")
    if is_trained(run):
        return State("trained", iteration, "not evaluated yet")
    return State("stopped" if iteration else "waiting", iteration)


def result(run: StudyRun, evaluation: dict) -> dict | None:
    """The result of a run; None if it is incomplete, or was trained or evaluated differently."""
    loaded = _result(run, evaluation)
    return None if loaded is None or changed(run) else loaded


def _result(run: StudyRun, evaluation: dict) -> dict | None:
    """The result of a run whose configuration is known to be unchanged."""
    file = run.folder / "result.json"
    if not file.is_file() or (loaded := read_json(file))["evaluation"] != evaluation:
        return None
    return loaded


def has_diverged(run: StudyRun) -> bool:
    """Whether this is a trial of a learning rate whose training ended with too many bad steps: it is not repeated."""
    return _has_diverged(run) and not changed(run)


def _has_diverged(run: StudyRun) -> bool:
    file = run.folder / "failed.json"
    return run.is_trial and file.is_file() and bool(_DIVERGED.search(read_json(file)["error"]))


def is_trained(run: StudyRun) -> bool:
    marker = run.folder / "FINISHED"
    return marker.is_file() and read_json(marker)["iteration"] >= run.iterations


def trained_iterations(run: StudyRun) -> int:
    """The last iteration in the run's metrics."""
    records = read_metrics(run.folder / "metrics.jsonl")
    return records[-1]["iteration"] if records else 0


def changed(run: StudyRun) -> str | None:
    """The first difference to the configuration and data that the run was started with; None if there is none."""
    file = run.folder / "run.yaml"
    if not file.is_file():
        return None
    remedy = "remove the folder, or give the study another output or the method or size another name"
    before, now = _saved_config(file.read_text(), file), _flat(config_file.to_tree(run.config))
    for key in dict.fromkeys((*before, *now)):
        if key.split(".")[0] not in _FREE and before.get(key) != now.get(key):
            values = f"{key} = {before.get(key)!r}, the study file now says {now.get(key)!r}"
            return f"{file}: was started with {values}; {remedy}"
    if (file := run.folder / "data.json").is_file():
        before, now = read_json(file), _data(run)
        for path in now:
            if before.get(path) != now[path]:
                return f"{run.folder}: was started with another data set at {path}; {remedy}"
    return None


def begin(run: StudyRun) -> None:
    """Save the run's configuration in its folder, or refuse to resume with another one.

    Raises:
        UserError: the run was started with another configuration; the key is named.
    """
    if difference := changed(run):
        raise UserError(difference)
    write_json(run.folder / "data.json", _data(run))
    write_text(run.folder / "run.yaml", yaml.safe_dump(config_file.to_tree(run.config), sort_keys=False))


def lock(run: StudyRun) -> int | None:
    """Take the run's lock: an open file descriptor for the programs to inherit; None if it is held.

    The lock is free once every process that inherited it has ended, in whatever way. The programs of a killed study so
    keep their locks, and the next study waits for them instead of training in the same folder.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def locked(run: StudyRun) -> bool:
    """Whether a process works on the run."""
    if not (run.folder / ".lock").is_file():
        return False
    descriptor = lock(run)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def last_line(log: Path) -> str:
    """The last program's last error line, or else its last line, without torchrun's own report."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith("== ")]
    output = [_RANK.sub("", line) for line in lines[starts[-1] + 1 if starts else 0 :]]
    output = [line for line in output if line.strip("=-~ ")]
    errors = [line for line in output if _ERROR.match(line)]
    return (errors or output or ["no output"])[-1]


@functools.cache
def _saved_config(text: str, file: Path) -> dict:
    return _flat(config_file.to_tree(config_file.load(Config, [file])))  # with the defaults of later keys


def _data(run: StudyRun) -> dict[str, str | None]:
    """Path of each data set -> checksum of its metadata."""
    sources = (*run.config.data.train, *run.config.data.validation)
    return {source.path: metadata_checksum(source.path) for source in sources}


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
