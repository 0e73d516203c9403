"""Images to train a VQ tokenizer on, all of them in memory."""

import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError
from megatron_ext.vq.image_decoder import CROP, IMAGE_SUFFIXES, PillowDecoder

DECODE_AT_ONCE = 256


def load_images(sources: list[Path], image_size: int, limit: int, workers: int = 2) -> Tensor:
    """Load up to ``limit`` images from WebDataset tars and folders, in order; damaged ones are left out.

    Returns:
        uint8 [n, 3, image_size, image_size].

    Raises:
        UserError: a source cannot be read, or holds no image that can be decoded.
    """
    decoder = PillowDecoder((image_size, image_size), CROP, workers)
    decoded: list[Tensor] = []
    with progress(desc="images", unit="", leave=False) as bar:
        files = islice((file for source in sources for file in _files(source)), limit)
        while batch := list(islice(files, DECODE_AT_ONCE)):
            decoded += [image for image in decoder(batch) if isinstance(image, Tensor)]
            bar.update(len(batch))
    decoder.close()
    if not decoded:
        raise UserError(f"{', '.join(map(str, sources))}: no image that can be decoded")
    return torch.stack(decoded).permute(0, 3, 1, 2).contiguous()


def _files(source: Path) -> Iterator[bytes]:
    try:
        if source.is_dir():
            for file in sorted(source.rglob("*")):
                if file.suffix.lower() in IMAGE_SUFFIXES:
                    yield file.read_bytes()
            return
        with tarfile.open(source) as archive:
            for member in archive:
                if Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                    yield archive.extractfile(member).read()
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from None
    except tarfile.TarError as error:
        raise UserError(f"{source}: neither a folder of images nor a tar ({error})") from None
