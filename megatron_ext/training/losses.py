"""The objective: a weighted sum over tasks of the mean cross-entropy of that task's loss tokens in the global batch.

The mean is over the global batch, so the objective does not depend on the cut into micro-batches and replicas. A task
without loss tokens contributes nothing. A z-loss is weighted and averaged alike, and reported apart. The loss of an
image token of several codes is the mean over its codes. With ``training.means: modality`` the objective is instead the
mean over all text tokens plus the mean over all image tokens (VILA-U).

Sums of losses are one vector, so that they can be added over micro-batches, replicas and batches: of cross-entropy and,
with a z-loss, of (log Z)^2 for each task; then, where image tokens are told from text
(:func:`~megatron_ext.training.prepare.summed_depths`), of the cross-entropy of image tokens at each of D depths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.config import TrainingConfig
from megatron_ext.token_classes import Modality, Task


@dataclass(frozen=True)
class MeanLosses:
    """Losses over a global batch, or several.

    Attributes:
        objective: without the z-loss, so that runs with and without one compare.
        tasks: mean cross-entropy per task, for the tasks that had loss tokens.
        z_loss: what the z-loss adds to the objective; None where training has none.
        depths: mean cross-entropy of the codes of each depth of an image token; empty with one code a token.
        modalities: mean cross-entropy of "text_tokens" and of "codes", where the objective consists of them.
    """

    objective: float
    tasks: dict[str, float]
    z_loss: float | None
    depths: list[float]
    modalities: dict[str, float]

    @classmethod
    def of(cls, sums: Sequence[float], counts: Sequence[float], training: TrainingConfig) -> "MeanLosses":
        """From sums of losses (see this module) and counts [tasks + 1], of the loss tokens of each task and of image
        tokens."""

        def means(totals: Sequence[float]) -> dict[str, float]:
            return {task.name.lower(): total / n for task, total, n in zip(Task, totals, counts) if n}

        def weighted(values: dict[str, float]) -> float:
            return sum(getattr(training.task_weights, name) * value for name, value in values.items())

        terms, count = sums_of_tasks(training), len(Task)
        by_task = [sums[start : start + count] for start in range(0, terms * count, count)]
        of_depths, image_tokens = sums[terms * count :], counts[count]
        depths = [total / image_tokens for total in of_depths] if image_tokens else []
        cross_entropy, *squares = map(means, by_task)
        modalities = {}
        if training.means == "modality":
            of_codes = sum(of_depths) / len(of_depths)
            totals = {"text_tokens": sum(by_task[0]) - of_codes, "codes": of_codes}
            numbers = sum(counts[:count]) - image_tokens, image_tokens
            modalities = {name: total / n for (name, total), n in zip(totals.items(), numbers) if n}
        return cls(
            objective=sum(modalities.values()) if training.means == "modality" else weighted(cross_entropy),
            tasks=cross_entropy,
            z_loss=training.z_loss * weighted(*squares) if squares else None,
            depths=depths if len(depths) > 1 else [],
            modalities=modalities,
        )

    def named(self, prefix: str = "") -> dict[str, float]:
        """For logs: "loss", "loss_<task>", "loss_depth_<number from 1>", "loss_text_tokens" and "loss_codes" and
        "z_loss", as far as there are any, each after ``prefix``."""
        named = {"loss": self.objective} | {f"loss_{name}": loss for name, loss in self.tasks.items()}
        named |= {f"loss_depth_{number}": loss for number, loss in enumerate(self.depths, start=1)}
        named |= {f"loss_{name}": loss for name, loss in self.modalities.items()}
        named |= {} if self.z_loss is None else {"z_loss": self.z_loss}
        return {prefix + name: loss for name, loss in named.items()}


def sums_of_tasks(training: TrainingConfig) -> int:
    """Number of terms that are summed for each task: cross-entropy and, with a z-loss, (log Z)^2."""
    return 1 + (training.z_loss > 0)


def global_counts(counts: Tensor) -> Tensor:
    """Loss tokens of each task and of image tokens in the *global* batch, float64 [tasks + 1], from the counts of this
    replica."""
    counts = counts.clone()
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    return counts


def cross_entropy_weights(counts: Tensor, training: TrainingConfig) -> Tensor:
    """Weight of a token's cross-entropy in the objective by its modality and task, float32 [modalities, tasks + 1]; the
    last entries, 0, are for targets without a task.

    Args:
        counts: result of :func:`global_counts`.
    """
    weights = torch.zeros(len(Modality), len(Task) + 1, dtype=torch.float64, device=counts.device)
    for task in Task:  # filled on the device: assigning numbers would copy them from the host
        weights[:, task].fill_(getattr(training.task_weights, task.name.lower()))
    of_tasks, image_tokens = counts[:-1], counts[-1]
    if training.means == "modality":
        weights /= torch.stack([of_tasks.sum() - image_tokens, image_tokens]).clamp(min=1)[:, None]
    else:
        weights[:, :-1] /= of_tasks.clamp(min=1)
    return weights.float()


def task_sums(token_losses: Tensor, tasks: Tensor) -> Tensor:
    """Sum of the losses [n] of each task's tokens, [tasks], float64; detached. ``tasks``: [n]."""
    of_task = tasks == torch.arange(len(Task), device=tasks.device)[:, None]
    return of_task.double() @ token_losses.detach().double()


def depth_sums(code_losses: Tensor, modalities: Tensor) -> Tensor:
    """Sum of the losses [n, D] of image tokens at each depth, [D], float64; detached. ``modalities``: [n]."""
    return (modalities == Modality.IMAGE).double() @ code_losses.detach().double()
