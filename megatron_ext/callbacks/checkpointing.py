"""Checkpoints during training, and the final one."""

import dataclasses
import time

from megatron_ext.distributed import report
from megatron_ext.training import watch
from megatron_ext.training.callback import Callback, StepRecord
from megatron_ext.training.run import Run


class Checkpointing(Callback):
    """Saves every ``checkpoint.interval`` iterations, and at the end if the last iteration is not saved yet."""

    def on_train_begin(self, run: Run) -> None:
        self._saved = run.progress.iteration

    def after_step(self, run: Run, record: StepRecord) -> None:
        run.checkpoints.poll()  # completes an asynchronous save
        interval = run.config.checkpoint.interval
        if interval and record.iteration % interval == 0:
            self._save(run)
            watch.at(record.iteration, "callbacks")

    def on_train_end(self, run: Run) -> None:
        if self._saved != run.progress.iteration or run.checkpoints.newest() is None:
            self._save(run)
        watch.at(run.progress.iteration, "save")
        run.checkpoints.finish()

    def _save(self, run: Run) -> None:
        watch.at(run.progress.iteration, "save")
        started = time.perf_counter()
        state = {
            "progress": dataclasses.asdict(run.progress),
            "config": dataclasses.asdict(run.config),
            "data": run.train_data.fingerprint,
            **run.identity,
        }
        self._saved = run.progress.iteration
        run.checkpoints.save(run.progress.iteration, run.chunks, run.optimizer, state)
        report(f"checkpoint of iteration {run.progress.iteration} ({time.perf_counter() - started:.1f} s)")
