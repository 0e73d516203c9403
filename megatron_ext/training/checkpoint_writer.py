"""Megatron-Core's checkpoint writer, told to report through a file.

The writer is a forked process, and Megatron-Core starts another one (a multiprocessing manager) on every rank to hand
back what it wrote. That one imports the main program anew, costs as much memory as it, and outlives a killed rank. A
file does as well, and carries the checksums, which the writer takes in the background too.

This is the one place that touches private names of Megatron-Core; checked against 0.16.1.
"""

import os
import pickle
import queue
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_ext.training.checkpoint_folder import fingerprint


class Report:
    """A queue for one item between the writer process and the rank that forked it.

    Attributes:
        files: once the item was got: fingerprint of each file that the writer wrote, by name.
    """

    def __init__(self, folder: Path, rank: int):
        self.files: dict[str, dict] = {}
        self._folder = folder
        self._path = folder / f".report_{rank}"

    def put(self, results) -> None:
        """Called by the writer with {process: [WriteResult]} when all is written, or with the exception."""
        files = {}
        if not isinstance(results, Exception):
            names = {r.storage_data.relative_path for written in results.values() for r in written}
            files = {name: fingerprint(self._folder / name) for name in sorted(names)}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_bytes(pickle.dumps((results, files)))
        os.replace(temporary, self._path)

    def get_nowait(self):
        """Called by the rank when the writer has ended; ``queue.Empty`` when it ended without a report."""
        if not self._path.exists():
            raise queue.Empty
        results, self.files = pickle.loads(self._path.read_bytes())
        self._path.unlink()
        return results


def prepare(state: dict, folder: Path, rank: int, data_parallel_group) -> tuple[AsyncRequest, Report]:
    """Copy the sharded ``state`` to host memory and plan the writing, spread over data-parallel replicas.

    Collective over all ranks.

    Returns:
        The request that writes when it is executed or scheduled, and its report, to be read once it is finalised.
    """
    report = Report(folder, rank)
    filesystem_async._results_queue = report
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1), data_parallel_group)
    return dist_checkpointing.save(state, str(folder), strategy, async_sharded_save=True), report
