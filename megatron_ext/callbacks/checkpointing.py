"""Checkpoints during training, and the final one."""

import dataclasses
import time
from collections.abc import Callable

from megatron_ext.checkpoints.errors import WriteError
from megatron_ext.distributed import report
from megatron_ext.errors import UserError
from megatron_ext.training import watch
from megatron_ext.training.callback import Callback, StepRecord, is_due
from megatron_ext.training.run import Run

MAX_FAILURES = 3
"""Checkpoints in a row that cannot be written before a run stops."""


class Checkpointing(Callback):
    """Saves every ``checkpoint.interval`` iterations, and at the end if the last iteration is not saved yet.

    A checkpoint that cannot be written (a full disk) is reported, and training goes on. The run fails after
    :data:`MAX_FAILURES` in a row, and if the final one cannot be written.
    """

    def __init__(self):
        self.seconds = 0.0  # that checkpoints have held up training since they were last logged
        self._failures = 0

    def on_train_begin(self, run: Run) -> None:
        self._saved = run.progress.iteration  # complete, or loaded
        self._saving = self._saved
        if run.checkpoints.replica:  # an earlier start may have ended before it was copied
            run.checkpoints.replica.offer_newer(run.checkpoints.newest())

    def after_step(self, run: Run, record: StepRecord) -> None:
        watch.at(record.iteration, "save")
        self._attempt(run.checkpoints.poll)  # completes an asynchronous save
        checkpoint = run.config.checkpoint
        if checkpoint.interval and record.iteration % checkpoint.interval == 0:
            self._save(run)
        elif checkpoint.local_interval and record.iteration % checkpoint.local_interval == 0:
            self._save_locally(run)
        watch.at(record.iteration, "callbacks")

    def on_train_end(self, run: Run) -> None:
        watch.at(run.progress.iteration, "save")
        self._attempt(run.checkpoints.finish)
        if self._saved != run.progress.iteration or run.checkpoints.newest() is None:
            self._failures = MAX_FAILURES - 1  # no other attempt follows
            self._save(run)
            self._attempt(run.checkpoints.finish)
        if run.checkpoints.replica:
            run.checkpoints.replica.finish()
            run.checkpoints.replica.offer_newer(run.checkpoints.newest())  # that copy may have failed
            run.checkpoints.replica.finish()
        if run.checkpoints.local:
            run.checkpoints.local.finish()
            if run.progress.iteration >= run.config.training.iterations:
                run.checkpoints.local.keep(lambda file: False)

    def _save(self, run: Run) -> None:
        watch.at(run.progress.iteration, "save")
        self._attempt(run.checkpoints.finish)
        started = time.perf_counter()
        self._saving = run.progress.iteration
        if self._attempt(lambda: run.checkpoints.save(self._saving, run.chunks, run.optimizer, _state(run))):
            report(f"checkpoint of iteration {self._saving} ({time.perf_counter() - started:.1f} s)")

    def _save_locally(self, run: Run) -> None:
        watch.at(run.progress.iteration, "save")
        started = time.perf_counter()
        run.checkpoints.local.save(run.progress.iteration, run.chunks, run.optimizer, _state(run))
        self.seconds += time.perf_counter() - started

    def _attempt(self, act: Callable[[], bool]) -> bool:
        """Call ``act``, which returns whether a checkpoint became complete. False if one could not be written."""
        started = time.perf_counter()
        try:
            if act():
                self._saved, self._failures = self._saving, 0
        except WriteError as error:
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                raise UserError(f"{error}; this was the last attempt") from None
            report(
                f"checkpoint of iteration {self._saving} not written: {error}; training goes on, and stops when "
                f"{MAX_FAILURES} in a row fail ({self._failures} so far)"
            )
            return False
        finally:
            self.seconds += time.perf_counter() - started
        return True


def _state(run: Run) -> dict:
    return {
        "progress": dataclasses.asdict(run.progress),
        "config": dataclasses.asdict(run.config),
        "data": run.train_data.fingerprint,
        **run.identity,
    }


class CheckpointSeconds(Callback):
    """Adds ``checkpoint_seconds`` to the metrics: how long checkpoints held up training since the last log line."""

    def __init__(self, checkpointing: Checkpointing):
        self._checkpointing = checkpointing

    def after_step(self, run: Run, record: StepRecord) -> None:
        if is_due(record.iteration, run.config.logging.interval, run.config):
            record.metrics["checkpoint_seconds"] = self._checkpointing.seconds
            self._checkpointing.seconds = 0.0
