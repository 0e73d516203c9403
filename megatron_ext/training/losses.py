"""The objective: a weighted sum over tasks of the mean cross-entropy of that task's loss tokens in the global batch."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.config import TaskWeights
from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import Task


def loss_token_counts(batch: Batch) -> Tensor:
    """Loss tokens of each task in the *global* batch, [tasks], float64.

    Args:
        batch: all rows of this replica for this step; the counts of the other replicas are added (one all-reduce of
            three numbers over the data-parallel group).
    """
    counts = torch.stack([(batch.loss_mask * (batch.task == task)).sum(dtype=torch.float64) for task in Task])
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    return counts


def token_weights(batch: Batch, counts: Tensor, weights: TaskWeights) -> Tensor:
    """Weight [b, s] of each token's cross-entropy, so that the weighted sum over the global batch is the objective.

    The denominators are those of the global batch, so the objective does not depend on how it is cut into
    micro-batches and replicas. A task without loss tokens contributes nothing.
    """
    per_task = torch.tensor([getattr(weights, task.name.lower()) for task in Task], dtype=torch.float64)
    per_task = (per_task.to(counts.device) / counts.clamp(min=1)).float()
    return batch.loss_mask * per_task[batch.task.long()]


def task_sums(token_losses: Tensor, tasks: Tensor) -> Tensor:
    """Sum of the cross-entropies [n] of each task's tokens, [tasks], float64; detached. ``tasks``: [n], int64."""
    sums = torch.zeros(len(Task), dtype=torch.float64, device=token_losses.device)
    return sums.index_add_(0, tasks, token_losses.detach().double())
