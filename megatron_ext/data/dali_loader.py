"""Steps through NVIDIA DALI: worker processes, shared memory and a prefetch queue.

The only module of this package that imports DALI. The steps equal those of :mod:`megatron_ext.data.plain_loader`, bit
for bit.
"""

import importlib.util

import torch

from megatron_ext.data.step_rows import StepRows
from megatron_ext.data.workers import Workers, WorkerSteps
from megatron_ext.errors import UserError


def available() -> bool:
    """Whether DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def _estimated_bytes(rows: StepRows) -> int:
    """Bytes of a step: about 30 a token, and 12 for each of its several codes, which are inputs and targets."""
    count, length = rows.shape
    return count * length * (32 + (12 * rows.depth if rows.depth > 1 else 0))


class DaliLoader:
    """Iterates over ``steps``, each uint8 [bytes] on the host. Part of a step stays on the host, which launches the
    kernels; the rest is copied to the device (:mod:`megatron_ext.data.transfer`).

    Args:
        workers: processes that pack rows ahead of training; 0 packs in this process.
        prefetch: steps prepared ahead.

    Attributes:
        workers: :class:`~megatron_ext.data.workers.Workers`.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, steps: WorkerSteps, workers: int, prefetch: int):
        if not available():
            raise UserError(
                "data.loader is 'dali', but DALI is missing; pip install nvidia-dali-cuda130, or set it to 'plain'"
            )
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        @pipeline_def
        def pipeline():
            return fn.external_source(
                source=steps.sample,
                batch=False,
                parallel=workers > 0,
                prefetch_queue_depth=prefetch if workers else None,
                # An estimate, so that memory shared with the workers rarely has to grow.
                bytes_per_sample_hint=_estimated_bytes(steps.rows) if workers else None,
                dtype=types.UINT8,
                ndim=1,
            )

        built = pipeline(
            batch_size=1,
            num_threads=1,
            device_id=None,
            py_num_workers=max(1, workers),
            py_start_method="spawn",
        )
        self.workers = Workers()
        with self.workers.starting():
            built.build()
        self._steps = DALIGenericIterator(built, ["step"], prepare_first_batch=False)

    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        [step] = next(self._steps)
        return step["step"][0]

    def close(self) -> None:
        """End the worker processes."""
        self.workers.close()
        self._steps = iter(())
