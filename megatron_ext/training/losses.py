"""The objective: a weighted sum over tasks of the mean cross-entropy of that task's loss tokens in the global batch.

Its denominators are those of the global batch, so it does not depend on how the batch is cut into micro-batches and
replicas. A task without loss tokens contributes nothing.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.config import TaskWeights
from megatron_ext.token_classes import Task


def global_counts(counts: Tensor) -> Tensor:
    """Loss tokens [tasks] of each task in the *global* batch, from those of this replica, float64."""
    counts = counts.clone()
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    return counts


def cross_entropy_weights(counts: Tensor, weights: TaskWeights) -> Tensor:
    """Weight in the objective of each token's cross-entropy by its task, float32 [tasks + 1]; the last one, 0, is that
    of targets without a task.

    Args:
        counts: of :func:`global_counts`.
    """
    per_task = torch.zeros(len(Task) + 1, dtype=torch.float64, device=counts.device)
    for task in Task:  # filled in on the device: a tensor of numbers, or one that is assigned, would be copied there
        per_task[task].fill_(getattr(weights, task.name.lower()))
    per_task[:-1] /= counts.clamp(min=1)
    return per_task.float()


def task_sums(token_losses: Tensor, tasks: Tensor) -> Tensor:
    """Sum of the cross-entropies [n] of each task's tokens, [tasks], float64; detached. ``tasks``: [n]."""
    of_task = tasks == torch.arange(len(Task), device=tasks.device)[:, None]
    return of_task.double() @ token_losses.detach().double()
