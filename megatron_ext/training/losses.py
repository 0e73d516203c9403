"""The objective: a weighted sum over tasks of the mean cross-entropy of that task's loss tokens in the global batch.

The mean is over the global batch, so the objective does not depend on the cut into micro-batches and replicas. A task
without loss tokens contributes nothing.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.config import TaskWeights
from megatron_ext.token_classes import Task


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
    """Sum of the cross-entropies [n] of each task's tokens, [tasks], float64; detached. ``tasks``: [n]."""
    of_task = tasks == torch.arange(len(Task), device=tasks.device)[:, None]
    return of_task.double() @ token_losses.detach().double()
