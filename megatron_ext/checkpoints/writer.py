"""Megatron-Core's checkpoint writer, without its helper processes.

Megatron-Core writes through forked processes, which return their results through a further process (a multiprocessing
manager). These processes outlive a killed rank: they hold its connections open, so that the other ranks wait until the
collective timeout, and some wait forever for its locks. Here the rank itself writes a synchronous save, and one forked
process writes an asynchronous save, waits for no other process and reports through a file. The writer also computes the
checksums.

This is the only module that uses private names of Megatron-Core; checked against 0.16.1 and 0.19.2.
"""

import gc
import os
import pickle
import queue
from functools import partial
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_ext import compat
from megatron_ext.checkpoints.folder import fingerprint


class Report:
    """A queue for one item from the writer to its rank, passed through a file if the writer is a forked process.

    Attributes:
        files: fingerprint of each written file by name, available after :meth:`get_nowait`.
    """

    def __init__(self, folder: Path, rank: int):
        self.files: dict[str, dict] = {}
        self._folder = folder
        self._path = folder / f".report_{rank}"
        self._rank_process = os.getpid()
        self._item = None

    def put(self, results) -> None:
        """Called by the writer at the end, with {file number: [WriteResult]} or the error."""
        files = {}
        if not isinstance(results, Exception):
            names = {r.storage_data.relative_path for written in results.values() for r in written}
            files = {name: fingerprint(self._folder / name) for name in sorted(names)}
        self._item = (results, files)
        if os.getpid() != self._rank_process:
            temporary = self._path.with_suffix(".tmp")
            temporary.write_bytes(pickle.dumps(self._item))
            os.replace(temporary, self._path)

    def get_nowait(self):
        """Called by the rank after the writer has ended; raises ``queue.Empty`` if it left no report."""
        if self._item is None:
            if not self._path.exists():
                raise queue.Empty
            self._item = pickle.loads(self._path.read_bytes())
            self._path.unlink()
        results, self.files = self._item
        return results


def prepare(state: dict, folder: Path, rank: int, data_parallel_group) -> tuple[AsyncRequest, Report]:
    """Plan how data-parallel replicas share the writing of the sharded ``state``. Collective over all ranks.

    Returns:
        The request that writes when executed or scheduled, and its report, to be read once the request is finalised.
    """
    report = Report(folder, rank)
    filesystem_async._results_queue = report
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1), data_parallel_group
    )
    request = dist_checkpointing.save(state, str(folder), strategy, async_sharded_save=True, **compat.save_options())
    if request.async_fn is not None:
        request = request._replace(async_fn=partial(_write, request.async_fn.args[0]))
    return request, report


def _write(transforms: list, rank: int, buckets: list, report: Report) -> None:
    """Write each bucket to its file, then report."""
    collecting = gc.isenabled()
    gc.disable()  # in a forked process, collecting the parent's tensors would touch its GPU
    results = {}
    for number, bucket in enumerate(buckets):
        outcomes, pending = queue.Queue(), queue.Queue()
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, outcomes, pending, use_fsync=True)
        _, result = outcomes.get_nowait()
        if isinstance(result, Exception):
            results = result
            break
        results[number] = result
    report.put(results)
    if collecting:
        gc.enable()
