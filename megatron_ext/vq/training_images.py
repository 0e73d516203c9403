"""Images to train a VQ tokenizer on, all of them in memory."""

import tarfile
from collections.abc import Iterator
from itertools import chain, groupby, islice
from pathlib import Path, PurePosixPath

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
        captioned: leave images without a caption out, and print how many; otherwise captions may be missing, and are
            empty.

    Returns:
        The images, and the caption of each.
    """
    decoder = PillowDecoder((image_size, image_size), CROP, workers)
    decoded: list[Tensor] = []
    captions: list[str] = []
    left_out = 0

    def usable() -> Iterator[tuple[bytes, str]]:
        nonlocal left_out
        for image, caption in chain.from_iterable(_pairs(source, captioned) for source in sources):
            if caption or not captioned:
                yield image, caption
            else:
                left_out += 1

    with progress(desc="images", unit="", leave=False) as bar:
        pairs = islice(usable(), limit)
        while batch := list(islice(pairs, DECODE_AT_ONCE)):
            for image, (_, caption) in zip(decoder([file for file, _ in batch]), batch):
                if isinstance(image, Tensor):
                    decoded.append(image)
                    captions.append(caption)
            bar.update(len(batch))
    decoder.close()
    if left_out:
        print(f"{left_out:,} images without a caption (KEY.txt) were left out")
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
                    caption = _caption(str(text), text.read_bytes()) if captioned and text.is_file() else ""
                    yield file.read_bytes(), caption
            return
        with tarfile.open(source) as archive:
            for _, files in groupby(_wanted(archive, captioned), lambda file: file[0].with_suffix("")):
                files = list(files)
                texts = [_caption(f"{source}:{path}", text) for path, text in files if path.suffix == ".txt"]
                for path, content in files:
                    if path.suffix != ".txt":
                        yield content, texts[0] if texts else ""
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from None
    except tarfile.TarError as error:
        raise UserError(f"{source}: neither a folder of images nor a tar ({error})") from None


def _wanted(archive: tarfile.TarFile, captioned: bool) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Images and, if wanted, texts. Each is read as it passes: a compressed tar goes back only to its start."""
    for member in archive:
        path = PurePosixPath(member.name)
        if member.isfile() and (path.suffix.lower() in IMAGE_SUFFIXES or captioned and path.suffix == ".txt"):
            yield path, archive.extractfile(member).read()


def _caption(name: str, text: bytes) -> str:
    try:
        return text.decode().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte {error.start})") from None
