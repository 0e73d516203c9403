"""One reader per replica, the same step on all its ranks.

The first rank of each model-parallel group reads; one broadcast between hosts, ahead of the step, hands the others the
buffer that a worker process made. From there one copy takes it to the device.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext.config import DataConfig, SourceConfig
from megatron_ext.data import dali
from megatron_ext.data.batch import Batch
from megatron_ext.data.decoding import decode
from megatron_ext.data.loader import PlainLoader
from megatron_ext.data.mixture import Mixture, Source
from megatron_ext.data.packed_rows import PackedRows, StepRows
from megatron_ext.data.packed_tokens import MAX_VOCABULARY
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.data.serialization import from_bytes
from megatron_ext.data.transfer import to_device
from megatron_ext.data.workers import WorkerSteps
from megatron_ext.errors import UserError

VALIDATION_SEED = 0
"""Validation rows do not depend on the seed of the run, so that runs can be compared."""


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands among the replicas of the model.

    Attributes:
        replica, replicas: its replica, of how many.
        group: the ranks that train one replica together; None alone.
        reader: rank (of the world) that reads for them.
    """

    replica: int
    replicas: int
    group: dist.ProcessGroup | None
    reader: int

    @classmethod
    def here(cls) -> "RankInfo":
        """That of this process, from Megatron-Core's parallel state; alone if there is no process group."""
        if not dist.is_initialized():
            return cls(0, 1, None, 0)
        from megatron.core import parallel_state

        return cls(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_model_parallel_group(),
            parallel_state.get_model_parallel_src_rank(),
        )

    @property
    def reads(self) -> bool:
        """Whether this process opens files."""
        return self.group is None or dist.get_rank() == self.reader


def build_mixture(sources: list[SourceConfig], data_config: DataConfig, vocabulary, train: bool) -> Mixture:
    """Open the sources and check them against the run; to be called by all ranks together.

    The ranks that read open the files, each its own; the others are told what was found.

    Args:
        train: whether for training (caption dropout, the seed of the run) or for validation.

    Raises:
        UserError: on every rank, if a source cannot be used on any (see ``Source.open``), or if readers found different
            data.
    """
    special = SpecialTokens.of(vocabulary)
    seed, dropout = (data_config.seed, data_config.caption_dropout) if train else (VALIDATION_SEED, 0.0)
    opened, error = None, None
    if RankInfo.here().reads:
        try:
            opened = _open("data.train" if train else "data.validation", sources, data_config, vocabulary)
        except UserError as refusal:
            error = str(refusal)
    found = _share(opened, error)
    return Mixture(opened or found, special, seed, dropout)


def _open(key: str, sources: list[SourceConfig], data_config: DataConfig, vocabulary) -> list[Source]:
    if not sources:
        raise UserError(f"config: '{key}' is empty; name at least one data set")
    if vocabulary.size > MAX_VOCABULARY:
        raise UserError(f"{vocabulary.folder}: {vocabulary.size} token ids, at most {MAX_VOCABULARY} are possible")
    if data_config.sequence_length < 2:
        raise UserError(f"config: 'data.sequence_length' is {data_config.sequence_length}, must be at least 2")
    opened = [
        Source.open(f"{key}[{i}]", source, vocabulary.fingerprint, data_config.sequence_length)
        for i, source in enumerate(sources)
    ]
    with_images = [source for source in opened if source.metadata["vq"]]
    for source in with_images[1:]:
        if source.metadata["vq"] != with_images[0].metadata["vq"]:
            raise UserError(
                f"{source.path}: images were encoded with VQ model {source.metadata['vq']['fingerprint']}, those of "
                f"{with_images[0].path} with {with_images[0].metadata['vq']['fingerprint']}; encode one of them again"
            )
    return opened


def _share(opened: list[Source] | None, error: str | None) -> list[Source]:
    """What the first rank of the world opened, without the open files; raises on all ranks if it failed on any."""
    if not dist.is_initialized():
        if error:
            raise UserError(error)
        return opened
    files = [source.metadata["files"] for source in opened] if opened else None
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (error, files))
    for rank, (refusal, theirs) in enumerate(outcomes):
        if refusal:
            raise UserError(refusal)
        if theirs and theirs != outcomes[0][1]:
            raise UserError(
                f"data: rank {rank} found other files than rank 0 at the same paths; copy the data sets again"
            )
    told = [[dataclasses.replace(source, dataset=None) for source in opened] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    return told[0]


@dataclass(frozen=True)
class Decoding:
    """Prepares nothing: a step is the :class:`~megatron_ext.data.batch.Batch` of its rows."""

    pad: int

    def __call__(self, packed_tokens: np.ndarray, step: int) -> Batch:
        return decode(packed_tokens, self.pad)


def step_batches(
    mixture: Mixture,
    data_config: DataConfig,
    rows_per_step: int,
    start_step: int,
    *,
    num_steps: int | None = None,
    prepare: Callable[[np.ndarray, int], object] | None = None,
) -> "StepBatches":
    """What ``prepare`` (None: :class:`Decoding`) makes of the rows of this process's replica, one per optimizer step;
    see :class:`StepBatches`."""
    prepare = prepare or Decoding(mixture.special.pad)
    return StepBatches(mixture, data_config, rows_per_step, start_step, prepare, num_steps)


class StepBatches:
    """Iterates over optimizer steps: what ``prepare`` made, with its arrays as tensors on this rank's device; the same
    on every rank of a replica.

    Args:
        rows_per_step: rows of a step over all replicas.
        start_step: first step wanted; all that is needed to resume.
        prepare: runs in the worker processes and pickles; called with the replica's rows of a step as packed tokens
            (:mod:`megatron_ext.data.packed_tokens`), int32 [rows, length], and the step's number.
        num_steps: steps of the run, counted from step 0; None: without end.

    Attributes:
        wait_seconds: time that was waited for the step that ``next()`` gave last.
    """

    def __init__(
        self,
        mixture: Mixture,
        data_config: DataConfig,
        rows_per_step: int,
        start_step: int,
        prepare: Callable[[np.ndarray, int], object],
        num_steps: int | None = None,
    ):
        self.wait_seconds = 0.0
        self._place = RankInfo.here()
        self._group = _host_group(self._place)
        self._step, self._end = start_step, sys.maxsize if num_steps is None else num_steps
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._fetched: list[tuple[object, float]] = []
        self._loader = None
        if self._place.reads:
            rows = PackedRows.of(mixture, data_config)
            mine = StepRows(rows, rows_per_step, self._place.replica, self._place.replicas)
            use_dali = data_config.loader == "dali" or (data_config.loader == "auto" and dali.available())
            self._loader = (dali.DaliLoader if use_dali else PlainLoader)(
                WorkerSteps(mine, start_step, self._end, prepare), data_config.workers, data_config.prefetch
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
        """Fetch the next step already, if there is one; collective over the replica's ranks."""
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
        value = to_device(from_bytes(buffer.numpy()), self._device)
        self._fetched.append((value, time.perf_counter() - started))

    def close(self) -> None:
        """End the worker processes; no step follows."""
        self._end = self._step
        self._fetched.clear()
        if self._loader is not None:
            self._loader.close()

    def _broadcast(self, buffer: torch.Tensor | None) -> torch.Tensor:
        size = torch.tensor([0 if buffer is None else buffer.numel()])
        dist.broadcast(size, self._place.reader, group=self._group)
        buffer = torch.empty(int(size), dtype=torch.uint8) if buffer is None else buffer
        dist.broadcast(buffer, self._place.reader, group=self._group)
        return buffer


_host_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _host_group(place: RankInfo) -> dist.ProcessGroup | None:
    """A group over the ranks of a replica that moves host memory; None alone. Collective over the world."""
    if place.group is None or place.group.size() == 1:
        return None
    if dist.get_backend(place.group) == "gloo":
        return place.group
    if place.group not in _host_groups:
        mine = dist.get_process_group_ranks(place.group)
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        of_rank = {tuple(ranks): dist.new_group(list(ranks), backend="gloo") for ranks in sorted(map(tuple, everyone))}
        _host_groups[place.group] = of_rank[tuple(mine)]
    return _host_groups[place.group]
