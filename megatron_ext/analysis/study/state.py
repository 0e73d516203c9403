"""What is known of a run from its folder: its configuration, whether somebody works on it, how far it is.

::

    RUN/run.yaml       its configuration, written before anything else
    RUN/.lock          held by whoever works on it, and by the programs that it has started
    RUN/log.txt        what those programs said
    RUN/failed.json    the last attempt's failure, until the next one
    RUN/result.json    written last: the run is complete
"""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_ext import config_file
from megatron_ext.analysis.study.grid import Run
from megatron_ext.command_line import read_json, write_text
from megatron_ext.errors import UserError
from megatron_ext.training.metrics import read_metrics

_FREE = ("output", "parallel", "checkpoint", "logging", "lifecycle", "evaluation")
"""Sections that may change between a run's beginning and its end: its results are the same, up to rounding."""


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
    if result(run, evaluation):
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
    """What a complete run measured; None for one that is not complete, or was evaluated otherwise."""
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
    """The first difference to the configuration that the run was begun with; None: there is none."""
    file = run.folder / "run.yaml"
    if not file.is_file():
        return None
    begun, wanted = (_flat(tree) for tree in (config_file.read_yaml(file), config_file.to_tree(run.config)))
    for key in dict.fromkeys((*begun, *wanted)):
        if key.split(".")[0] not in _FREE and begun.get(key) != wanted.get(key):
            return (
                f"{file}: was begun with {key} = {begun.get(key)!r}, the study file now says {wanted.get(key)!r}; "
                "remove the folder, or give the study another output or the method or size another name"
            )
    return None


def begin(run: Run) -> None:
    """Write the configuration down, or refuse to go on with another one.

    Raises:
        UserError: the run was begun with another configuration; the key is named.
    """
    if difference := changed(run):
        raise UserError(difference)
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
    """The last line of a log that says anything, without a rank's prefix of torchrun's."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
