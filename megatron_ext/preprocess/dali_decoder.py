"""Image files to pixels of the VQ tokenizer's size, with NVIDIA DALI; no other module of the package imports DALI."""

import importlib.util

import numpy as np
import torch
from torch import Tensor

from megatron_ext.vq.image_decoder import CROP, PillowDecoder, evidently_whole


def available() -> bool:
    """Whether DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class DaliDecoder:
    """Decodes and resizes batches with DALI: on the CPU, or with the GPU's JPEG decoder.

    One bad file makes DALI fail on a whole batch. Files that are not evidently whole therefore go to Pillow, which
    decodes them one by one. A batch that still fails is halved until the bad file is found, which then goes to Pillow.

    Args:
        image_size: (H, W), pixels.
        resize: CROP or SQUASH.
        workers: threads.
        batch_size: largest number of files per call.
        device: decodes JPEG files; the pixels are returned on the host.
    """

    def __init__(
        self, image_size: tuple[int, int], resize: str, workers: int, batch_size: int, device: torch.device | str
    ):
        import nvidia.dali

        self.name = f"dali {nvidia.dali.__version__}"
        self.image_size, self.resize = image_size, resize
        self.workers, self.batch_size, self.device = workers, batch_size, torch.device(device)
        self._pillow = PillowDecoder(image_size, resize, workers)
        self._pipeline = None

    def __call__(self, files: list[bytes]) -> list[Tensor | str]:
        """The pixels of each file, uint8 [H, W, 3], or one line that says why it cannot be decoded."""
        results: list = [None] * len(files)
        whole = [i for i, file in enumerate(files) if evidently_whole(file)]
        for i, result in zip(whole, self._halving([files[i] for i in whole])):
            results[i] = result
        others = [i for i, result in enumerate(results) if result is None]
        for i, result in zip(others, self._pillow([files[i] for i in others])):
            results[i] = result
        return results

    def close(self) -> None:
        self._pipeline = None
        self._pillow.close()

    def _halving(self, files: list[bytes]) -> list[Tensor | None]:
        """Pixels of each file; None where DALI cannot read it."""
        if not files:
            return []
        try:
            return list(self._run(files))
        except RuntimeError:
            self._pipeline = None  # unusable after an error
        if len(files) == 1:
            return [None]
        middle = len(files) // 2
        return self._halving(files[:middle]) + self._halving(files[middle:])

    def _run(self, files: list[bytes]) -> Tensor:
        """uint8 [n, H, W, 3]."""
        if self._pipeline is None:
            self._pipeline = self._build()
        [pixels] = self._pipeline.run(encoded=[np.frombuffer(file, np.uint8) for file in files])
        # Through the host even from the GPU: the pixels are few, and DALI's and torch's streams stay independent.
        return torch.from_numpy(np.array(pixels.as_cpu().as_array()))

    def _build(self):
        from nvidia.dali import fn, math, pipeline_def, types

        gpu = self.device.type == "cuda"

        @pipeline_def
        def pipeline():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            image = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
            region = {}
            if self.resize == CROP:
                size = fn.cast(fn.peek_image_shape(encoded)[:2], dtype=types.FLOAT)
                target = np.array(self.image_size, np.float32)
                ratio = size / target
                half = math.min(ratio[0], ratio[1]) * target / 2
                region = {"roi_start": size / 2 - half, "roi_end": size / 2 + half}
            return fn.resize(
                image,
                size=self.image_size,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
                dtype=types.UINT8,
                **region,
            )

        built = pipeline(
            batch_size=self.batch_size,
            num_threads=self.workers,
            device_id=torch.empty(0, device=self.device).device.index if gpu else None,
            # One batch at a time, so that a failure belongs to the batch just given; the caller decodes ahead anyway.
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        built.build()
        return built
