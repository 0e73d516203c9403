"""Images to train a VQ tokenizer on, all of them in memory."""

import tarfile
from collections.abc import Iterator
from itertools import groupby, islice
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
    return load_captioned(sources, image_size, limit, workers, captioned=False)[0]


def load_captioned(
    sources: list[Path], image_size: int, limit: int, workers: int = 2, captioned: bool = True
) -> tuple[Tensor, list[str]]:
    """As :func:`load_images`, with the captions: the text beside an image, ``KEY.txt``.

    Args:
        captioned: leave images without a caption out; otherwise captions may be missing, and are empty.

    Returns:
        The images, and the caption of each.
    """
    decoder = PillowDecoder((image_size, image_size), CROP, workers)
    decoded: list[Tensor] = []
    captions: list[str] = []
    with progress(desc="images", unit="", leave=False) as bar:
        pairs = (pair for source in sources for pair in _pairs(source, captioned) if pair[1] or not captioned)
        pairs = islice(pairs, limit)
        while batch := list(islice(pairs, DECODE_AT_ONCE)):
            for image, (_, caption) in zip(decoder([file for file, _ in batch]), batch):
                if isinstance(image, Tensor):
                    decoded.append(image)
                    captions.append(caption)
            bar.update(len(batch))
    decoder.close()
    if not decoded:
        kind = "image with a caption" if captioned else "image"
        raise UserError(f"{', '.join(map(str, sources))}: no {kind} that can be decoded")
    return torch.stack(decoded).permute(0, 3, 1, 2).contiguous(), captions


def _pairs(source: Path, captioned: bool) -> Iterator[tuple[bytes, str]]:
    """Images and, if wanted, the texts beside them."""
    try:
        if source.is_dir():
            for file in sorted(source.rglob("*")):
                if file.suffix.lower() in IMAGE_SUFFIXES:
                    text = file.with_suffix(".txt")
                    yield file.read_bytes(), text.read_text().strip() if captioned and text.is_file() else ""
            return
        with tarfile.open(source) as archive:
            for _, members in groupby(archive, lambda member: str(Path(member.name).with_suffix(""))):
                members = list(members)
                texts = [member for member in members if captioned and member.name.endswith(".txt")]
                caption = archive.extractfile(texts[0]).read().decode().strip() if texts else ""
                for member in members:
                    if Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                        yield archive.extractfile(member).read(), caption
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from None
    except tarfile.TarError as error:
        raise UserError(f"{source}: neither a folder of images nor a tar ({error})") from None
