"""Pictures to train a VQ tokenizer on, all of them in memory."""

import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.command_line import progress
from megatron_ext.errors import UserError
from megatron_ext.preprocess.images import CROP, PillowDecoder
from megatron_ext.preprocess.inputs import IMAGE_SUFFIXES

DECODE_AT_ONCE = 256


def load_pictures(sources: list[Path], image_size: int, limit: int, workers: int = 2) -> Tensor:
    """Up to ``limit`` pictures of WebDataset tars and folders, in order; those that cannot be decoded are left out.

    Returns:
        uint8 [n, 3, image_size, image_size].

    Raises:
        UserError: a source cannot be read, or there is no picture in any.
    """
    decoder = PillowDecoder((image_size, image_size), CROP, workers)
    decoded: list[Tensor] = []
    with progress(desc="pictures", unit="") as bar:
        files = islice((file for source in sources for file in _files(source)), limit)
        for some in _batches(files, DECODE_AT_ONCE):
            decoded += [picture for picture in decoder(some) if isinstance(picture, Tensor)]
            bar.update(len(some))
    decoder.close()
    if not decoded:
        raise UserError(f"{', '.join(map(str, sources))}: no picture that can be decoded")
    return torch.stack(decoded).permute(0, 3, 1, 2).contiguous()


def _batches(items: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    while some := list(islice(items, size)):
        yield some


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
        raise UserError(f"{source}: neither a folder of pictures nor a tar ({error})") from None
