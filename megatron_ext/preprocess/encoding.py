"""Batches of images to VQ codes, with files read ahead and decoded ahead of the encoder."""

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_ext.preprocess.parts import Part
from megatron_ext.preprocess.samples import Image
from megatron_ext.vq import VQModel
from megatron_ext.vq.pixels import from_bytes

AHEAD = 3
"""Batches read, and batches decoded, before the encoder asks for them."""


@dataclass
class Batch:
    """Some images of a part; a part without images has one empty batch.

    Attributes:
        final: whether the part ends with it.
        files: bytes of each image, or one line that says why there are none.
        failures: why an image has no pixels.
        pixels: uint8 [n, H, W, 3] of the images that have not failed.
    """

    part: Part
    images: list[Image]
    final: bool
    files: list[bytes | str] = field(default_factory=list)
    failures: dict[Image, str] = field(default_factory=dict)
    pixels: Tensor | None = None

    @property
    def decoded(self) -> list[Image]:
        """The images in the order of ``pixels``."""
        return [image for image in self.images if image not in self.failures]


@dataclass
class Encoded:
    """Progress of one batch; ``codes`` of the whole part comes with its last one.

    Attributes:
        codes: int64 [h*w] of every image that could be read, at the end of a part.
        failures: images of this batch that could not be read.
        images: number of images encoded in this batch.
        share: of the part that this batch is.
    """

    part: Part
    failures: dict[Image, str]
    images: int
    share: float
    codes: dict[Image, np.ndarray] | None = None


def encode(
    parts: Iterable[Part], decoder: Callable | None, vq: VQModel | None, batch_size: int, workers: int
) -> Iterator[Encoded]:
    """Encode the images of each part; batches never reach across parts, so they are the same in every run.

    Args:
        decoder: files to pixels (:class:`megatron_ext.preprocess.images.PillowDecoder`); None without images.
    """
    read = ahead(_read(_batches(parts, batch_size), workers))
    codes, order = [], []
    with closing(ahead(_decode(read, decoder))) as batches:
        for batch in batches:
            if batch.pixels is not None:
                codes.append(_codes(vq, batch.pixels))
            order += batch.decoded
            event = Encoded(batch.part, batch.failures, len(batch.decoded), 1.0)
            total = len(batch.part.images)
            if total:
                event.share = len(batch.images) / total
            if batch.final:
                # Only now is there a reason to wait for the device.
                rows = torch.cat(codes).cpu().numpy() if codes else ()
                event.codes = dict(zip(order, rows))
                codes, order = [], []
            yield event


def ahead(items: Generator, depth: int = AHEAD) -> Iterator:
    """``items``, made by a thread that is up to ``depth`` of them ahead. Closing the result closes ``items``."""
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry) -> None:
        while not stopped.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        try:
            with closing(items):
                for item in items:
                    put((item, None))
                    if stopped.is_set():
                        return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        thread.join()


def _batches(parts: Iterable[Part], batch_size: int) -> Generator:
    for part in parts:
        images = part.images
        for start in range(0, max(1, len(images)), batch_size):
            yield Batch(part, images[start : start + batch_size], final=start + batch_size >= len(images))


def _read(batches: Generator, workers: int) -> Generator:
    with closing(batches), ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        for batch in batches:
            with _Files(image.file for image in batch.images if image.size is not None) as tars:
                batch.files = list(pool.map(tars.read, batch.images))
            yield batch


class _Files:
    """Opens the tars that a batch is in once, and every other file when it is read."""

    def __init__(self, tars: Iterable[str]):
        self._open = {file: os.open(file, os.O_RDONLY) for file in set(tars)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, image: Image) -> bytes | str:
        """The bytes of an image, or one line that says why there are none."""
        try:
            if image.size is not None:
                return os.pread(self._open[image.file], image.size, image.offset)
            with open(image.file, "rb") as file:
                return file.read()
        except OSError as error:
            return error.strerror or str(error)


def _decode(batches: Generator, decoder: Callable | None) -> Generator:
    with closing(batches):
        for batch in batches:
            if batch.images:
                batch.failures = {i: file for i, file in zip(batch.images, batch.files) if isinstance(file, str)}
                found = batch.decoded
                results = decoder([file for file in batch.files if isinstance(file, bytes)])
                batch.failures |= {image: result for image, result in zip(found, results) if isinstance(result, str)}
                pixels = [result for result in results if not isinstance(result, str)]
                if pixels:
                    stacked = torch.stack(pixels)
                    batch.pixels = stacked.pin_memory() if torch.cuda.is_available() else stacked
                batch.files = []
            yield batch


@torch.inference_mode()
def _codes(vq: VQModel, pixels: Tensor) -> Tensor:
    """uint8 [n, H, W, 3] to codes [n, h*w]."""
    device = next(vq.network.parameters()).device
    return vq.encode(from_bytes(pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)))
