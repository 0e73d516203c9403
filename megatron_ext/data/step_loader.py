"""The steps of a run: one reader per replica, the same step on all ranks of the replica.

The first rank of each replica reads. Ahead of each step, one broadcast between hosts gives the other ranks
the buffer that a worker process made; from there one copy takes it to the device.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext.config import DataConfig
from megatron_ext.data import dali_loader
from megatron_ext.data.composition import Composition
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.data.packed_tokens import Unpack
from megatron_ext.data.plain_loader import PlainLoader
from megatron_ext.data.rank_info import RankInfo
from megatron_ext.data.serialization import from_bytes
from megatron_ext.data.step_rows import StepRows
from megatron_ext.data.transfer import to_device
from megatron_ext.data.workers import WorkerSteps


def step_batches(
    mixture: Mixture,
    data_config: DataConfig,
    rows_per_step: int,
    start_step: int,
    *,
    num_steps: int | None = None,
    prepare: Callable[[np.ndarray, int], object] | None = None,
    composition: Composition | None = None,
    own_share: Callable[[object], object] = lambda step: step,
) -> "StepBatches":
    """The steps of this process's replica, as ``prepare`` makes them of its rows; see :class:`StepBatches`. The default
    is :class:`~megatron_ext.data.packed_tokens.Unpack`."""
    prepare = prepare or Unpack(mixture.special.pad, mixture.depth, mixture.special.image_offset)
    return StepBatches(mixture, data_config, rows_per_step, start_step, prepare, num_steps, composition, own_share)


class StepBatches:
    """Iterates over optimizer steps: the results of ``prepare``, with arrays as tensors on this rank's device; the same
    on every rank of a replica, but for what ``own_share`` leaves.

    Args:
        rows_per_step: rows of a step over all replicas.
        start_step: first step; all that is needed to resume.
        prepare: runs in the worker processes, so it must pickle; called with the replica's rows of a step as packed
            tokens (:mod:`megatron_ext.data.packed_tokens`), int32 [rows, numbers of a row], and the step's number.
        num_steps: steps of the run, counted from step 0; None: without end.
        composition: how the replicas' rows are cut; see :class:`~megatron_ext.data.step_rows.StepRows`.
        own_share: the part of a result that this rank copies to its device.

    Attributes:
        wait_seconds: time spent waiting for the last step that ``next()`` returned.
    """

    def __init__(
        self,
        mixture: Mixture,
        data_config: DataConfig,
        rows_per_step: int,
        start_step: int,
        prepare: Callable[[np.ndarray, int], object],
        num_steps: int | None = None,
        composition: Composition | None = None,
        own_share: Callable[[object], object] = lambda step: step,
    ):
        self.wait_seconds = 0.0
        self._rank, self._own_share = RankInfo.here(), own_share
        self._group = _host_group(self._rank)
        self._step, self._end = start_step, sys.maxsize if num_steps is None else num_steps
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._fetched: list[tuple[object, float]] = []
        self._loader = None
        if self._rank.reads:
            rows = PackedRows.of(mixture, data_config)
            step_rows = StepRows(rows, rows_per_step, self._rank.replica, self._rank.replicas, composition)
            use_dali = data_config.loader == "dali" or (data_config.loader == "auto" and dali_loader.available())
            self._loader = (dali_loader.DaliLoader if use_dali else PlainLoader)(
                WorkerSteps(step_rows, start_step, self._end, prepare), data_config.workers, data_config.prefetch
            )

    def __iter__(self):
        return self

    def __next__(self):
        self.prefetch()
        if not self._fetched:
            raise StopIteration
        value, self.wait_seconds = self._fetched.pop()
        return value

    def prefetch(self) -> None:
        """Fetch the next step ahead of time, if there is one. Collective over the replica's ranks."""
        if self._fetched or self._step >= self._end:
            return
        self._step += 1
        started = time.perf_counter()
        buffer = None
        if self._loader is not None:
            self._loader.workers.check()
            buffer = next(self._loader)
        if self._group is not None:
            buffer = self._broadcast(buffer)
        value = to_device(self._own_share(from_bytes(buffer.numpy())), self._device)
        self._fetched.append((value, time.perf_counter() - started))

    def close(self) -> None:
        """End the worker processes and the iteration."""
        self._end = self._step
        self._fetched.clear()
        if self._loader is not None:
            self._loader.close()

    def _broadcast(self, buffer: torch.Tensor | None) -> torch.Tensor:
        size = torch.tensor([0 if buffer is None else buffer.numel()])
        dist.broadcast(size, self._rank.reader, group=self._group)
        buffer = torch.empty(int(size), dtype=torch.uint8) if buffer is None else buffer
        dist.broadcast(buffer, self._rank.reader, group=self._group)
        return buffer


_host_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _host_group(rank: RankInfo) -> dist.ProcessGroup | None:
    """A gloo group over the ranks of a replica; None for a single rank. Collective over the world."""
    if rank.group is None or rank.group.size() == 1:
        return None
    if dist.get_backend(rank.group) == "gloo":
        return rank.group
    if rank.group not in _host_groups:
        from megatron_ext.distributed import new_group

        own_ranks = dist.get_process_group_ranks(rank.group)
        all_ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(all_ranks, own_ranks)
        groups = {tuple(ranks): new_group(list(ranks), "gloo") for ranks in sorted(map(tuple, all_ranks))}
        _host_groups[rank.group] = groups[tuple(own_ranks)]
    return _host_groups[rank.group]
