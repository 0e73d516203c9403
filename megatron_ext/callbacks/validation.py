"""Losses on the validation data."""

from megatron_ext.training import watch
from megatron_ext.training.callback import Callback, StepRecord, is_due
from megatron_ext.training.run import Run
from megatron_ext.training.validation import mean_losses


class Validation(Callback):
    """Validates every ``training.validation_interval`` iterations where there is validation data."""

    def after_step(self, run: Run, record: StepRecord) -> None:
        if run.validation_data and is_due(record.iteration, run.config.training.validation_interval, run.config):
            watch.at(record.iteration, "evaluate")
            record.metrics |= validation_losses(run)
            record.log_now = True
            watch.at(record.iteration, "callbacks")


def validation_losses(run: Run) -> dict[str, float]:
    """:func:`~megatron_ext.training.validation.mean_losses` of the run, as metrics."""
    preparation, composition = run.preparation(training=False), run.composition(training=False)
    losses = mean_losses(run.chunks, run.config, run.validation_data, preparation, composition)
    return losses.named("validation_")
