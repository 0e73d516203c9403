"""Losses on the validation data."""

import dataclasses

from megatron_ext.data import step_batches
from megatron_ext.training import watch
from megatron_ext.training.callback import Callback, StepRecord, is_due
from megatron_ext.training.losses import MeanLosses
from megatron_ext.training.prepare import own_share
from megatron_ext.training.run import Run
from megatron_ext.training.step import evaluate_step, evaluation_mode


class Validation(Callback):
    """Validates every ``training.validation_interval`` iterations where there is validation data."""

    def after_step(self, run: Run, record: StepRecord) -> None:
        if run.validation_data and is_due(record.iteration, run.config.training.validation_interval, run.config):
            watch.at(record.iteration, "evaluate")
            record.metrics |= validation_losses(run)
            record.log_now = True
            watch.at(record.iteration, "callbacks")


def validation_losses(run: Run) -> dict[str, float]:
    """Losses over the first ``validation_batches`` global batches of the validation data, always the same rows.

    Returns:
        "validation_loss", the objective, "validation_loss_<task>" for each task that has loss tokens, and
        "validation_z_loss" with a z-loss.
    """
    config = run.config
    steps = step_batches(
        run.validation_data,
        dataclasses.replace(config.data, loader="plain", workers=0),
        config.training.global_batch_size,
        0,
        num_steps=config.training.validation_batches,
        prepare=run.preparation(training=False),
        composition=run.composition(training=False),
        own_share=own_share,
    )
    with evaluation_mode(run.chunks):
        sums, counts = map(sum, zip(*(evaluate_step(run.chunks, step, config) for step in steps)))
    steps.close()
    losses = MeanLosses.of(sums.tolist(), counts.tolist(), config.training)
    return losses.named("validation_")
