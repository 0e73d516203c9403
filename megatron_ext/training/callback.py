"""What may happen around the steps of training: the protocol that logging, validation, checkpoints and others follow.

:func:`~megatron_ext.training.loop.train` takes a list of callbacks and calls each method below on all of them, in the
order of the list. ``megatron_ext/callbacks`` has the ones that a run uses, and builds the list.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.config import Config
from megatron_ext.training.prepare import StepInput
from megatron_ext.training.run import Run


@dataclass
class StepRecord:
    """One step, for the callbacks that follow it to read and add to.

    Attributes:
        metrics: what is logged: "iteration" and plain numbers by name (``callbacks/logging.py`` lists them), the same
            on every rank but for times, which are this rank's.
        pictures: (caption, file) of each picture to log.
        log_now: log this step even if no log line is due.
        stop_reason: why the run stops after this step; None: it continues.
    """

    metrics: dict
    pictures: list[tuple[str, Path]] = field(default_factory=list)
    log_now: bool = False
    stop_reason: str | None = None

    @property
    def iteration(self) -> int:
        """The iteration that this step completed: 1, 2, ..."""
        return self.metrics["iteration"]


class Callback:
    """Does nothing; a subclass overrides the methods it needs.

    Every rank calls every method, in the same order, so a method may communicate. The time that callbacks take is no
    part of ``step_seconds``. ``run.progress.iteration`` counts the steps done.
    """

    def on_train_begin(self, run: Run) -> None:
        """Called once, before the first step of this process."""

    def before_batch(self, run: Run) -> None:
        """Called before a step's batch is fetched."""

    def before_step(self, run: Run, step: StepInput) -> None:
        """Called with a step's batch: this replica's rows, on the device."""

    def after_step(self, run: Run, record: StepRecord) -> None:
        """Called after the optimizer took the step, or refused a bad one ("skip_reason" in the metrics)."""

    def on_train_end(self, run: Run) -> None:
        """Called once after the last step, also when the run was told to stop; not after an error."""

    def close(self) -> None:
        """Release resources. Called once, also after an error and where ``on_train_begin`` never ran."""


class CallbackList(Callback):
    """Calls several callbacks in order; closes them in reverse order."""

    def __init__(self, callbacks: Sequence[Callback]):
        self.callbacks = list(callbacks)

    def on_train_begin(self, run: Run) -> None:
        for callback in self.callbacks:
            callback.on_train_begin(run)

    def before_batch(self, run: Run) -> None:
        for callback in self.callbacks:
            callback.before_batch(run)

    def before_step(self, run: Run, step: StepInput) -> None:
        for callback in self.callbacks:
            callback.before_step(run, step)

    def after_step(self, run: Run, record: StepRecord) -> None:
        for callback in self.callbacks:
            callback.after_step(run, record)

    def on_train_end(self, run: Run) -> None:
        for callback in self.callbacks:
            callback.on_train_end(run)

    def close(self) -> None:
        with ExitStack() as closing:
            for callback in self.callbacks:
                closing.callback(callback.close)


def is_due(iteration: int, interval: int, config: Config) -> bool:
    """Whether something falls due after ``iteration``: every ``interval`` iterations and after the last one; with an
    interval of 0 never."""
    return bool(interval) and (iteration % interval == 0 or iteration == config.training.iterations)
