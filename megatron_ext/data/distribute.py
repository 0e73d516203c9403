"""One reader per replica, the same batch on all its ranks.

The first rank of each model-parallel group reads; one broadcast of four bytes a token hands the step to the others,
and every rank decodes it.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ext.config import DataConfig, SourceConfig
from megatron_ext.data import dali
from megatron_ext.data.batch import Batch
from megatron_ext.data.decoding import decode
from megatron_ext.data.loader import PlainLoader
from megatron_ext.data.mixture import Mixture, Source
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.data.rows import PackedRows, StepRows
from megatron_ext.data.words import MAX_VOCABULARY
from megatron_ext.data.workers import WorkerRows
from megatron_ext.errors import UserError

VALIDATION_SEED = 0
"""Validation rows do not depend on the seed of the run, so that runs can be compared."""


@dataclass(frozen=True)
class Place:
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
    def here(cls) -> "Place":
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
    if Place.here().reads:
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
    with_images = [source for source in opened if source.card["vq"]]
    for source in with_images[1:]:
        if source.card["vq"] != with_images[0].card["vq"]:
            raise UserError(
                f"{source.path}: images were encoded with VQ model {source.card['vq']['fingerprint']}, those of "
                f"{with_images[0].path} with {with_images[0].card['vq']['fingerprint']}; encode one of them again"
            )
    return opened


def _share(opened: list[Source] | None, error: str | None) -> list[Source]:
    """What the first rank of the world opened, without the open files; raises on all ranks if it failed on any."""
    if not dist.is_initialized():
        if error:
            raise UserError(error)
        return opened
    files = [source.card["files"] for source in opened] if opened else None
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


def step_batches(
    mixture: Mixture, data_config: DataConfig, rows_per_step: int, start_step: int, *, num_steps: int | None = None
) -> "StepBatches":
    """Batches of this process's replica, one per optimizer step; see :class:`StepBatches`."""
    return StepBatches(mixture, data_config, rows_per_step, start_step, num_steps)


class StepBatches:
    """Iterates over optimizer steps; on every rank of a replica the same :class:`Batch` of all the replica's rows.

    Args:
        rows_per_step: rows of a step over all replicas.
        start_step: first step wanted; all that is needed to resume.
        num_steps: steps of the run, counted from step 0; None: without end.

    Attributes:
        wait_seconds: time that the last ``next()`` took.
    """

    def __init__(
        self,
        mixture: Mixture,
        data_config: DataConfig,
        rows_per_step: int,
        start_step: int,
        num_steps: int | None = None,
    ):
        self.wait_seconds = 0.0
        self._place = Place.here()
        self._pad = mixture.special.pad
        self._step, self._end = start_step, sys.maxsize if num_steps is None else num_steps
        gpu = torch.cuda.is_available()
        self._device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self._shape = (rows_per_step // self._place.replicas, data_config.sequence_length)
        self._loader = None
        if self._place.reads:
            rows = PackedRows(mixture, data_config.sequence_length)
            mine = StepRows(rows, rows_per_step, self._place.replica, self._place.replicas)
            use_dali = data_config.loader == "dali" or (data_config.loader == "auto" and dali.available())
            self._loader = (dali.DaliLoader if use_dali else PlainLoader)(
                WorkerRows(mine, start_step, self._end), data_config.workers, data_config.prefetch, self._device
            )

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        if self._step >= self._end:
            raise StopIteration
        self._step += 1
        started = time.perf_counter()
        if self._loader is not None:
            self._loader.workers.check()
            packed = next(self._loader)
        else:
            packed = torch.empty(self._shape, dtype=torch.int32, device=self._device)
        if self._place.group is not None and self._place.group.size() > 1:
            dist.broadcast(packed, self._place.reader, group=self._place.group)
        batch = decode(packed, self._pad)
        self.wait_seconds = time.perf_counter() - started
        return batch

    def close(self) -> None:
        """End the worker processes; no batch follows."""
        self._end = self._step
        if self._loader is not None:
            self._loader.close()
