"""Megatron-Core's checkpoint writer, without its helper processes.

Megatron-Core writes through forked processes and hands back what they wrote through another one (a multiprocessing
manager). Those outlive a killed rank: they hold its connections open, so that the other ranks wait for it until the
collective timeout, and some wait for ever for its locks. Here a save is written by the rank itself, an asynchronous
one by one forked process that waits for nobody and reports through a file. Checksums are taken there, too.

This is the one place that touches private names of Megatron-Core; checked against 0.16.1 and 0.19.2.
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
    """A queue for one item from the writer to its rank; a file carries it where the writer is a forked process.

    Attributes:
        files: once the item was got: fingerprint of each file that the writer wrote, by name.
    """

    def __init__(self, folder: Path, rank: int):
        self.files: dict[str, dict] = {}
        self._folder = folder
        self._path = folder / f".report_{rank}"
        self._rank_process = os.getpid()
        self._item = None

    def put(self, results) -> None:
        """Called by the writer with {number of the file: [WriteResult]} when all is written, or with the error."""
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
        """Called by the rank when the writer has ended; raises ``queue.Empty`` if it ended without a report."""
        if self._item is None:
            if not self._path.exists():
                raise queue.Empty
            self._item = pickle.loads(self._path.read_bytes())
            self._path.unlink()
        results, self.files = self._item
        return results


def prepare(state: dict, folder: Path, rank: int, data_parallel_group) -> tuple[AsyncRequest, Report]:
    """Plan the writing of the sharded ``state``, spread over data-parallel replicas. Collective over all ranks.

    Returns:
        The request that writes when it is executed or scheduled, and its report, to be read once it is finalised.
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
    """Write each bucket into its file, and report."""
    collecting = gc.isenabled()
    gc.disable()  # in a forked process, collecting the parent's tensors would touch its GPU
    results = {}
    for number, bucket in enumerate(buckets):
        done, turn = queue.Queue(), queue.Queue()
        turn.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, done, turn, use_fsync=True)
        _, result = done.get_nowait()
        if isinstance(result, Exception):
            results = result
            break
        results[number] = result
    report.put(results)
    if collecting:
        gc.enable()
