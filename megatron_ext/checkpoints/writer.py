"""Megatron-Core's checkpoint writer, without its helper processes.

Megatron-Core writes through forked processes, which return their results through a further process (a multiprocessing
manager). These processes outlive a killed rank: they hold its connections open, so that the other ranks wait until the
collective timeout, and some wait forever for its locks. Here the rank itself writes a synchronous save, and one forked
process writes an asynchronous save, waits for no other process and reports through shared memory. The writer also
computes the checksums.

Megatron-Core's rank 0 also writes small files by itself, before or between collective operations: on a full disk it
would stop there, and the other ranks would wait for it. Here its errors travel with those of all ranks.

This is the only module that uses private names of Megatron-Core; checked against 0.16.1 and 0.19.2.
"""

import gc
import os
import pickle
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_ext import compat
from megatron_ext.checkpoints.errors import cause
from megatron_ext.checkpoints.folder import fingerprint


@dataclass
class Written:
    """What one rank has written.

    Attributes:
        results: torch's WriteResult of each entry.
        files: fingerprint of each file by name.
        failure: what could not be written, and why; None: all is written.
    """

    results: list = field(default_factory=list)
    files: dict[str, dict] = field(default_factory=dict)
    failure: str | None = None


class Report:
    """A queue for one :class:`Written` from the writer to its rank. It passes through memory that a forked writer
    shares, not through a file: the disk may be full."""

    def __init__(self):
        self.failure: str | None = None  # of the rank itself
        self._memory = os.memfd_create("checkpoint_report")
        self._rank_process = os.getpid()
        self._written: Written | None = None

    def put(self, written: Written) -> None:
        """Called by the writer at the end."""
        if os.getpid() == self._rank_process:
            self._written = written
        else:
            with open(os.dup(self._memory), "wb") as stream:
                pickle.dump(written, stream)

    def take(self) -> Written:
        """Called by the rank, once, after the writer has ended."""
        with open(self._memory, "rb") as stream:
            stream.seek(0)
            try:
                written = self._written or pickle.load(stream)
            except (EOFError, pickle.UnpicklingError):
                written = Written(failure="the writing process was killed")
        return Written(failure=self.failure) if self.failure else written


def prepare(state: dict, folder: Path, data_parallel_group) -> tuple[AsyncRequest, Report, Callable[[list], None]]:
    """Plan how data-parallel replicas share the writing of the sharded ``state``. Collective over all ranks.

    Returns:
        The request that writes when executed or scheduled, its report, and a function that writes what describes the
        whole checkpoint, on rank 0, from the :attr:`Written.results` of every rank.
    """
    report = Report()
    filesystem_async._results_queue = report
    strategy = _Strategy("torch_dist", 1, thread_count=1)
    parallel = FullyParallelSaveStrategyWrapper(strategy, data_parallel_group)
    with _failure_remembered(report):
        request = dist_checkpointing.save(
            state, str(folder), parallel, async_sharded_save=True, **compat.save_options()
        )
    if request.async_fn is None:  # this rank has nothing to write
        report.put(Written())
    else:
        request = request._replace(async_fn=partial(_write, request.async_fn.args[0]))

    def describe(results: list) -> None:
        strategy.write_metadata(results)
        save_config(CheckpointingConfig(strategy.backend, strategy.version), str(folder))

    return request._replace(finalize_fns=[]), report, describe


class _Strategy(TorchDistSaveShardedStrategy):
    """Hands out the function that writes ``.metadata``, which needs the results of all ranks."""

    write_metadata: Callable[[list], None]

    def _get_save_and_finalize_callbacks(self, writer, planned, *options):
        self.write_metadata = partial(writer.finish, planned[1])
        return super()._get_save_and_finalize_callbacks(writer, planned, *options)


@contextmanager
def _failure_remembered(report: Report) -> Iterator[None]:
    """Before 0.19 rank 0 writes the state that all ranks share into ``common.pt``, while the others go on to the next
    collective operation: what runs inside passes an error there on to ``report``."""
    strategy = getattr(common, "TorchCommonSaveStrategy", None)
    if strategy is None:
        yield
        return

    def save_common(self, state, folder):
        if dist.get_rank() == 0:
            path = Path(folder, common.COMMON_STATE_FNAME)
            try:
                with open(path, "wb") as stream:  # given a path instead, torch would not say what went wrong
                    torch.save(state, stream)
            except (OSError, RuntimeError) as error:
                report.failure = f"{path}: {cause(error)}"

    theirs, strategy.save_common = strategy.save_common, save_common
    try:
        yield
    finally:
        strategy.save_common = theirs


def _write(transforms: list, rank: int, buckets: list, report: Report) -> None:
    """Write each bucket to its file, then report."""
    collecting = gc.isenabled()
    gc.disable()  # in a forked process, collecting the parent's tensors would touch its GPU
    written = Written()
    for number, bucket in enumerate(buckets):
        outcomes, pending = queue.Queue(), queue.Queue()
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, outcomes, pending, use_fsync=True)
        _, result = outcomes.get_nowait()
        if isinstance(result, Exception):
            written.failure = f"{bucket[0]}: {cause(result)}"
            break
        written.results += result
        try:
            written.files[bucket[1]] = fingerprint(Path(bucket[0]))
        except OSError as error:
            written.failure = f"{bucket[0]}: {cause(error)}"
            break
    report.put(written)
    if collecting:
        gc.enable()
