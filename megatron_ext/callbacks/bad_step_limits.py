"""Too many bad steps end the run."""

from megatron_ext.training.callback import Callback, StepRecord
from megatron_ext.training.run import Run


class BadStepLimits(Callback):
    """Raises a UserError past ``bad_steps.max_consecutive`` or ``max_total``.

    Belongs after logging, which then has the last bad step, and before checkpointing, which then saves nothing.
    """

    def after_step(self, run: Run, record: StepRecord) -> None:
        run.bad_steps.enforce_limits(record.iteration)
