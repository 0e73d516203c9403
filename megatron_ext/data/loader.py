"""Steps of rows through torch's DataLoader: the loader without DALI."""

import atexit

import torch
from torch.utils.data import DataLoader

from megatron_ext.data.workers import WorkerRows, Workers


class PlainLoader:
    """Iterates over the steps of ``rows``, each int32 [rows, length] on ``device``.

    Args:
        workers: processes that pack ahead; 0 packs when a step is asked for.
        prefetch: steps prepared ahead.

    Attributes:
        workers: :class:`~megatron_ext.data.workers.Workers`.
    """

    def __init__(self, rows: WorkerRows, workers: int, prefetch: int, device: torch.device):
        self._device = device
        loader = DataLoader(
            rows,
            batch_size=None,
            sampler=range(rows.start, rows.end),
            num_workers=workers,
            prefetch_factor=-(-prefetch // workers) if workers else None,
            multiprocessing_context="spawn" if workers else None,
            pin_memory=device.type == "cuda",
        )
        self.workers = Workers()
        with self.workers.starting():
            self._steps = iter(loader)
        if workers:
            atexit.register(self.close)  # before torch's own exit handlers, which would wait for the workers for ever

    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        return next(self._steps).to(self._device, non_blocking=True)

    def close(self) -> None:
        """End the worker processes."""
        self.workers.close()
        self._steps = iter(())
        atexit.unregister(self.close)
