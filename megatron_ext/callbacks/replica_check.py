"""Whether all replicas have the same weights, bit for bit."""

from collections import Counter

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_ext.distributed import device, gather_weights
from megatron_ext.errors import UserError
from megatron_ext.training.callback import Callback, StepRecord, is_due
from megatron_ext.training.run import Run
from megatron_ext.transformer.initialization import global_parameters


class ReplicaCheck(Callback):
    """Compares every ``lifecycle.replica_check_interval`` iterations, and before every checkpoint, also local ones,
    so that none is saved whose parts come from different weights.

    Belongs before checkpointing. What it compares is the 64-bit sum of each parameter's bits.
    """

    def on_train_begin(self, run: Run) -> None:
        self._last_good = run.progress.iteration

    def after_step(self, run: Run, record: StepRecord) -> None:
        """
        Raises:
            UserError: on every rank, if weights differ; names ranks and parameters.
        """
        checkpoint = run.config.checkpoint
        intervals = run.config.lifecycle.replica_check_interval, checkpoint.interval, checkpoint.local_interval
        due = any(interval and is_due(record.iteration, interval, run.config) for interval in intervals)
        if not (due or record.stop_reason):
            return
        gather_weights(run.chunks)
        differences = differing(run.chunks)
        if differences:
            before = run.checkpoints.newest()
            raise UserError(
                f"iteration {record.iteration}: the replicas' weights differ ({'; '.join(differences[:4])}"
                f"{f'; {len(differences) - 4} more' if len(differences) > 4 else ''}); they were the same at iteration "
                f"{self._last_good}; "
                + (f"{before} is from before, start again to resume from it" if before else "there is no checkpoint")
            )
        self._last_good = record.iteration


def differing(chunks: list) -> list[str]:
    """What differs between replicas, the same on every rank: ranks and a parameter for each. Collective."""
    parameters = [pair for chunk in chunks for pair in global_parameters(unwrap_model(chunk))]
    own = torch.stack([sum_of_bits(parameter) for _, parameter in parameters])
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    # One message: the largest sum, and the largest of the negated sums.
    extremes = torch.cat([own, -own])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    unequal = (extremes[: len(own)] != -extremes[len(own) :]).nonzero().flatten().tolist()
    unequal_ranks = torch.tensor(float(len(unequal)), device=device())
    dist.all_reduce(unequal_ranks)
    if not unequal_ranks.item():
        return []
    replicas = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(replicas, own, group=group)
    ranks = dist.get_process_group_ranks(group)
    lines = [odd_ranks(parameters[i][0], [int(replica[i]) for replica in replicas], ranks) for i in unequal]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, lines)
    return sorted({line for of_rank in gathered for line in of_rank})


def sum_of_bits(parameter: Tensor) -> Tensor:
    """The sum of a parameter's bits as integers, int64."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    data = parameter.detach()
    return data.contiguous().view(kinds[data.element_size()]).sum(dtype=torch.int64)


def odd_ranks(name: str, sums: list[int], ranks: list[int]) -> str:
    """Names the ranks that are not of the majority, or all of them where there is none."""
    (common, times), *others = Counter(sums).most_common()
    tied = any(other == times for _, other in others)
    odd = [rank for rank, value in zip(ranks, sums) if tied or value != common]
    return f"{name} on rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))}"
