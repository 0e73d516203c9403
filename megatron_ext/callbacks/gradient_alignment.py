"""Gradient alignment of the two tasks (``analysis/gradients.py``), measured during training."""

from megatron_ext.analysis.gradients import alignment
from megatron_ext.training.callback import Callback, StepRecord, is_due
from megatron_ext.training.prepare import StepInput
from megatron_ext.training.run import Run


class GradientAlignment(Callback):
    """Measures every ``logging.gradient_alignment_interval`` iterations, with the weights before the step and on the
    step's own batch."""

    def __init__(self, interval: int):
        self._interval = interval
        self._measured: dict | None = None

    def before_step(self, run: Run, step: StepInput) -> None:
        if is_due(run.progress.iteration + 1, self._interval, run.config):
            self._measured = alignment(run.chunks, step, run.resolved)

    def after_step(self, run: Run, record: StepRecord) -> None:
        if self._measured:
            record.metrics["gradient_alignment"] = self._measured
            record.log_now = True
            self._measured = None
