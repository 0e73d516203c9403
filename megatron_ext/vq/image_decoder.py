"""Image files to pixels of the VQ tokenizer's size, one image at a time, with Pillow."""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image as PillowImage
from PIL import ImageOps
from torch import Tensor

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

CROP, SQUASH = "crop", "squash"
"""How an image is resized: from its largest centred rectangle of the right aspect ratio, or whole, with both sides
scaled."""


@dataclass(frozen=True)
class Preparation:
    """How images are made what a tokenizer was trained on.

    Attributes:
        filter: of the change of size.
        from_top: a picture that is taller than the tokenizer's is cropped from its top, by whole pixels, instead of
            from its center.
        understanding, generation: CROP or SQUASH, for pictures that are asked about and for those to be drawn.
    """

    filter: Literal["bilinear", "bicubic"] = "bilinear"
    from_top: bool = False
    understanding: str = CROP
    generation: str = CROP


JPEG_TAIL = 1 << 10
"""Bytes at the end of a JPEG file that are searched for its end marker, since cameras append data to it."""


class PillowDecoder:
    """Decodes with Pillow, in threads.

    Args:
        image_size: (H, W), pixels.
        resize: CROP or SQUASH.
        workers: threads.
        preparation: of the tokenizer; ``resize`` is chosen already.
    """

    name = "pillow"

    def __init__(
        self, image_size: tuple[int, int], resize: str, workers: int, preparation: Preparation = Preparation()
    ):
        self.image_size, self.resize, self.preparation = image_size, resize, preparation
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __call__(self, files: list[bytes]) -> list[Tensor | str]:
        """The pixels of each file, uint8 [H, W, 3], or one line that says why it cannot be decoded."""
        return list(self._pool.map(self._decode, files))

    def close(self) -> None:
        self._pool.shutdown()

    def _decode(self, file: bytes) -> Tensor | str:
        try:
            with PillowImage.open(io.BytesIO(file)) as image:
                return torch.from_numpy(np.array(self._fit(ImageOps.exif_transpose(image).convert("RGB"))))
        except PillowImage.UnidentifiedImageError:
            return "not an image of a known format"
        except Exception as error:  # Pillow's format plugins raise exceptions of many types on damaged files
            return " ".join(str(error).split()) or type(error).__name__

    def _fit(self, image: PillowImage.Image) -> PillowImage.Image:
        height, width = self.image_size
        box = centred(image.height, image.width, self.image_size) if self.resize == CROP else None
        if box and self.preparation.from_top:
            # Cropped before it is resized: no pixel outside has an influence.
            image, box = image.crop(from_top(box)), None
        return image.resize((width, height), PillowImage.Resampling[self.preparation.filter.upper()], box)


def centred(height: int, width: int, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred rectangle with the aspect ratio of ``image_size``: left, top, right, bottom."""
    scale = min(height / image_size[0], width / image_size[1])
    h, w = image_size[0] * scale, image_size[1] * scale
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def from_top(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """A box of :func:`centred`, moved to the top and to whole pixels."""
    left, top, right, bottom = box
    start = round(left)
    return start, 0, start + round(right - left), round(bottom - top)


def evidently_whole(file: bytes) -> bool:
    """Whether these bytes start and end like a JPEG, PNG or WebP file: a cheap check that catches nearly all files that
    are truncated or of another format."""
    if file.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" in file[-JPEG_TAIL:]
    if file.startswith(b"\x89PNG\r\n\x1a\n"):
        return file.endswith(b"IEND\xaeB`\x82")
    if file.startswith(b"RIFF") and file[8:12] == b"WEBP":
        return len(file) >= int.from_bytes(file[4:8], "little") + 8
    return False
