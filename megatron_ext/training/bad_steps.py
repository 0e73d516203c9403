"""Bad steps, which the optimizer must not apply: a loss or gradient norm that is not finite, or a loss that jumps.

Pure bookkeeping. Every rank reaches the same judgement, given the same numbers: the loss and the gradient norm of the
*global* batch, after their reduction.
"""

import math
from collections import deque

from megatron_ext.errors import UserError
from megatron_ext.run_config import BadStepConfig


class BadSteps:
    """Judges each step before the optimizer applies it.

    Attributes:
        total: bad steps of the whole run, resumptions included.
        consecutive: bad steps in a row up to the last one judged.
        reason: why the last step judged was bad; None: it was good.
    """

    def __init__(self, config: BadStepConfig):
        self.config = config
        self.total = 0
        self.consecutive = 0
        self.reason: str | None = None
        self._good_losses: deque[float] = deque(maxlen=config.spike_window)

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Whether the optimizer may apply this step, as :meth:`judge` says."""
        return self.judge(loss, grad_norm) is None

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why this step is bad; None: it is good. Either is counted.

        Later losses are compared with the last losses of good steps; the loss of a bad step never counts among them.
        """
        self.reason = self._judgement(loss, grad_norm)
        if self.reason is None:
            self.consecutive = 0
            self._good_losses.append(loss)
        else:
            self.total += 1
            self.consecutive += 1
        return self.reason

    def enforce_limits(self, iteration: int) -> None:
        """End a run that has had too many bad steps. Call it once the last one is logged.

        Raises:
            UserError: more than ``max_consecutive`` in a row, or more than ``max_total`` in all.
        """
        for count, limit, how in (
            (self.consecutive, "max_consecutive", "in a row"),
            (self.total, "max_total", "in all"),
        ):
            allowed = getattr(self.config, limit)
            if count > allowed:
                raise UserError(
                    f"iteration {iteration}: {count} bad step{'s' * (count > 1)} {how}, 'bad_steps.{limit}' allows "
                    f"{allowed} (see skip_reason in metrics.jsonl; try a lower optimizer.lr or a longer warm-up)"
                )

    def _judgement(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        window, losses = self.config.spike_window, self._good_losses
        if not window or len(losses) < window:
            return None
        mean = math.fsum(losses) / window
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / window)
        excess = loss - mean
        if excess > self.config.spike_deviations * deviation and excess > self.config.spike_ratio * abs(mean):
            return f"the loss {loss:.4g} is a spike: the last {window} were {mean:.4g} +- {deviation:.2g}"
        return None

    def state_dict(self) -> dict:
        """Counts and window as plain numbers, for a checkpoint."""
        return {"total": self.total, "consecutive": self.consecutive, "good_losses": list(self._good_losses)}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned; a window of another length keeps the newest losses."""
        self.total = state["total"]
        self.consecutive = state["consecutive"]
        self._good_losses = deque(state["good_losses"], maxlen=self.config.spike_window)
