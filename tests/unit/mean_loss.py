"""The custom callback that docs/training.md shows."""

from megatron_ext.training.callback import Callback


class MeanLoss(Callback):
    """Adds ``mean_loss`` to the metrics: the mean loss of the steps so far that were not skipped."""

    def __init__(self):
        self.losses = []

    def after_step(self, run, record):
        if "skip_reason" not in record.metrics:
            self.losses.append(record.metrics["loss"])
            record.metrics["mean_loss"] = sum(self.losses) / len(self.losses)
