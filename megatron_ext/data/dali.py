"""Steps of rows through NVIDIA DALI: worker processes, shared memory, a prefetch queue and the copy to the GPU.

The only module that imports DALI. The rows are those of :mod:`megatron_ext.data.loader`, bit for bit.
"""

import importlib.util

import torch

from megatron_ext.data.workers import WorkerRows, Workers
from megatron_ext.errors import UserError


def available() -> bool:
    """Whether DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class DaliLoader:
    """Iterates over the steps of ``rows``, each int32 [rows, length] on ``device``.

    Args:
        workers: processes that pack ahead; 0 packs in this process.
        prefetch: steps prepared ahead.

    Attributes:
        workers: :class:`~megatron_ext.data.workers.Workers`.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, rows: WorkerRows, workers: int, prefetch: int, device: torch.device):
        if not available():
            raise UserError(
                "data.loader is 'dali', but DALI is missing; pip install nvidia-dali-cuda130, or set it to 'plain'"
            )
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        gpu = device.type == "cuda"
        height, width = rows.rows.shape

        @pipeline_def
        def pipeline():
            step = fn.external_source(
                source=rows.sample,
                batch=False,
                parallel=workers > 0,
                prefetch_queue_depth=prefetch if workers else None,
                bytes_per_sample_hint=height * width * 4 if workers else None,
                dtype=types.INT32,
                ndim=2,
            )
            return step.gpu() if gpu else step

        made = pipeline(
            batch_size=1,
            num_threads=1,
            device_id=device.index if gpu else None,
            py_num_workers=max(1, workers),
            py_start_method="spawn",
        )
        self.workers = Workers()
        with self.workers.starting():
            made.build()
        self._steps = DALIGenericIterator(made, ["rows"], prepare_first_batch=False)

    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        [step] = next(self._steps)
        return step["rows"][0]

    def close(self) -> None:
        """End the worker processes."""
        self.workers.close()
        self._steps = iter(())
