"""``OUTPUT/FINISHED``, which tells a complete run from one that stopped early: both exit with code 0."""

from pathlib import Path

from megatron_ext.files import write_json


def finished_file(output: str | Path) -> Path:
    """The marker of a complete run."""
    return Path(output) / "FINISHED"


def mark_finished(output: str | Path, iteration: int) -> None:
    """Mark the run as complete; call it last, once the final checkpoint is complete."""
    write_json(finished_file(output), {"iteration": iteration})


def clear_finished(output: str | Path) -> None:
    """Remove an earlier run's mark; call it before the first iteration of a run that has iterations left."""
    finished_file(output).unlink(missing_ok=True)
