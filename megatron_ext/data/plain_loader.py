"""Steps through torch's DataLoader, without DALI."""

import atexit

import torch
from torch.utils.data import DataLoader

from megatron_ext.data.workers import Workers, WorkerSteps


class PlainLoader:
    """Iterates over ``steps``, each uint8 [bytes] on the host.

    Args:
        workers: processes that pack rows ahead of training; 0 packs each step on demand.
        prefetch: steps prepared ahead.

    Attributes:
        workers: :class:`~megatron_ext.data.workers.Workers`.
    """

    def __init__(self, steps: WorkerSteps, workers: int, prefetch: int):
        loader = DataLoader(
            steps,
            batch_size=None,
            sampler=range(steps.start, steps.end),
            num_workers=workers,
            prefetch_factor=-(-prefetch // workers) if workers else None,
            multiprocessing_context="spawn" if workers else None,
        )
        self.workers = Workers()
        with self.workers.starting():
            self._steps = iter(loader)
        if workers:
            atexit.register(self.close)  # runs before torch's exit handlers, which would wait for the workers forever

    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        return next(self._steps)

    def close(self) -> None:
        """End the worker processes."""
        self.workers.close()
        self._steps = iter(())
        atexit.unregister(self.close)
