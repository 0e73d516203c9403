"""The objective: a weighted sum over tasks of the mean cross-entropy of that task's loss tokens in the global batch.

The mean is over the global batch, so the objective does not depend on the cut into micro-batches and replicas. A task
without loss tokens contributes nothing. A z-loss is weighted and averaged alike, and reported apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.config import TaskWeights, TrainingConfig
from megatron_ext.token_classes import Task


@dataclass(frozen=True)
class MeanLosses:
    """Losses over a global batch, or several.

    Attributes:
        objective: without the z-loss, so that runs with and without one compare.
        tasks: mean cross-entropy per task, for the tasks that had loss tokens.
        z_loss: what the z-loss adds to the objective; None where training has none.
    """

    objective: float
    tasks: dict[str, float]
    z_loss: float | None

    @classmethod
    def of(cls, sums: Sequence[Sequence[float]], counts: Sequence[float], training: TrainingConfig) -> "MeanLosses":
        """From sums [terms, tasks] of cross-entropy and, with a z-loss, (log Z)^2, and counts [tasks] of tokens."""

        def means(totals: Sequence[float]) -> dict[str, float]:
            return {task.name.lower(): total / n for task, total, n in zip(Task, totals, counts) if n}

        def weighted(values: dict[str, float]) -> float:
            return sum(getattr(training.task_weights, name) * value for name, value in values.items())

        cross_entropy, *squares = map(means, sums)
        return cls(weighted(cross_entropy), cross_entropy, training.z_loss * weighted(*squares) if squares else None)

    def named(self, prefix: str = "") -> dict[str, float]:
        """For logs: "loss", "loss_<task>" and, if there is one, "z_loss", each after ``prefix``."""
        named = {"loss": self.objective} | {f"loss_{name}": loss for name, loss in self.tasks.items()}
        named |= {} if self.z_loss is None else {"z_loss": self.z_loss}
        return {prefix + name: loss for name, loss in named.items()}


def global_counts(counts: Tensor) -> Tensor:
    """Loss tokens of each task in the *global* batch, float64 [tasks], from the counts of this replica."""
    counts = counts.clone()
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    return counts


def cross_entropy_weights(counts: Tensor, weights: TaskWeights) -> Tensor:
    """Weight of a token's cross-entropy in the objective by its task, float32 [tasks + 1]; the last entry, 0, is for
    targets without a task.

    Args:
        counts: result of :func:`global_counts`.
    """
    per_task = torch.zeros(len(Task) + 1, dtype=torch.float64, device=counts.device)
    for task in Task:  # filled on the device: assigning numbers would copy them from the host
        per_task[task].fill_(getattr(weights, task.name.lower()))
    per_task[:-1] /= counts.clamp(min=1)
    return per_task.float()


def task_sums(token_losses: Tensor, tasks: Tensor) -> Tensor:
    """Sum of the losses [n] of each task's tokens, [tasks], float64; detached. ``tasks``: [n]."""
    of_task = tasks == torch.arange(len(Task), device=tasks.device)[:, None]
    return of_task.double() @ token_losses.detach().double()
