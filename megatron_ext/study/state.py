"""What is known of a run from its folder: its configuration, whether somebody works on it, how far it is.

::

    RUN/run.yaml       its configuration, written before anything else
    RUN/data.json      its data sets, and the checksums of their cards
    RUN/.lock          held by whoever works on it, and by the programs that it has started
    RUN/log.txt        what those programs said
    RUN/failed.json    the last attempt's failure, until the next one
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
from megatron_ext.errors import UserError
from megatron_ext.files import read_json, write_json, write_text
from megatron_ext.study.grid import Run, metadata_checksum
from megatron_ext.training.metrics import read_metrics

_FREE = ("output", "parallel", "checkpoint", "logging", "lifecycle", "evaluation")
"""Sections that may change between a run's beginning and its end: its results are the same, up to rounding."""

_RANK = re.compile(r"^\[\w+\]:\s*")  # torchrun's, before what a rank says
_ERROR = re.compile(r"^\w+\.py: \S")  # a program's one line about what was wrong


@dataclass(frozen=True)
class State:
    """``kind`` is finished, running, failed, changed, trained (not evaluated), stopped or waiting."""

    kind: str
    iteration: int = 0
    note: str = ""


def of(run: Run, evaluation: dict) -> State:
    """The state of a run.

    Args:
        evaluation: what the run is to be evaluated with, as :func:`~.steps.fingerprint` gives it.
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
        return State("failed", iteration, f"{failure['step']}: {failure['error']}")
    if is_trained(run):
        return State("trained", iteration, "not evaluated yet")
    return State("stopped" if iteration else "waiting", iteration)


def result(run: Run, evaluation: dict) -> dict | None:
    """What a complete run measured; None for one that is not complete, or was trained or evaluated otherwise."""
    found = _result(run, evaluation)
    return None if found is None or changed(run) else found


def _result(run: Run, evaluation: dict) -> dict | None:
    """The same, of a run that is known not to be changed."""
    file = run.folder / "result.json"
    if not file.is_file() or (found := read_json(file))["evaluation"] != evaluation:
        return None
    return found


def is_trained(run: Run) -> bool:
    marker = run.folder / "FINISHED"
    return marker.is_file() and read_json(marker)["iteration"] >= run.iterations


def trained_iterations(run: Run) -> int:
    """The last iteration that the run logged."""
    records = read_metrics(run.folder / "metrics.jsonl")
    return records[-1]["iteration"] if records else 0


def changed(run: Run) -> str | None:
    """The first difference to the configuration and data that the run was begun with; None: there is none."""
    file = run.folder / "run.yaml"
    if not file.is_file():
        return None
    remedy = "remove the folder, or give the study another output or the method or size another name"
    begun, wanted = _begun_with(file.read_text(), file), _flat(config_file.to_tree(run.config))
    for key in dict.fromkeys((*begun, *wanted)):
        if key.split(".")[0] not in _FREE and begun.get(key) != wanted.get(key):
            return (
                f"{file}: was begun with {key} = {begun.get(key)!r}, the study file now says {wanted.get(key)!r}; "
                + remedy
            )
    if (cards := run.folder / "data.json").is_file():
        before, now = read_json(cards), _data(run)
        for path in now:
            if before.get(path) != now[path]:
                return f"{run.folder}: was begun with another data set {path} than is there now; {remedy}"
    return None


def begin(run: Run) -> None:
    """Write the configuration down, or refuse to go on with another one.

    Raises:
        UserError: the run was begun with another configuration; the key is named.
    """
    if difference := changed(run):
        raise UserError(difference)
    write_json(run.folder / "data.json", _data(run))
    write_text(run.folder / "run.yaml", yaml.safe_dump(config_file.to_tree(run.config), sort_keys=False))


def lock(run: Run) -> int | None:
    """Take the run's lock: an open file descriptor, to be handed to the programs that work on it; None: it is held.

    It is free once every process that has it is gone, however it ended. So a study that is killed leaves its programs
    their locks, and the next one waits for them instead of training in the same folder.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def locked(run: Run) -> bool:
    """Whether somebody works on the run."""
    if not (run.folder / ".lock").is_file():
        return False
    descriptor = lock(run)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def last_line(log: Path) -> str:
    """What a log's program said last; of one that torchrun has ended, what it said before torchrun's own report."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith("== ")]
    said = [_RANK.sub("", line) for line in lines[starts[-1] + 1 if starts else 0 :]]
    said = [line for line in said if line.strip("=-~ ")]
    errors = [line for line in said if _ERROR.match(line)]
    return (errors or said or ["it said nothing"])[-1]


@functools.cache
def _begun_with(text: str, file: Path) -> dict:
    return _flat(config_file.read_yaml(file))


def _data(run: Run) -> dict[str, str | None]:
    """Data set -> checksum of its metadata."""
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
