"""Documents of the run's data as a person reads them: pictures decoded from their codes, with the text beside."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from megatron_ext.config import DataConfig, SourceConfig
from megatron_ext.data.format import ANSWER, IMAGE, Dataset
from megatron_ext.vocabulary import Vocabulary
from megatron_ext.vq import VQModel, load

SHEET = "reconstructions.png"
"""File in a VQ folder: pictures above what is left of them after encoding and decoding."""

_SMALLEST = 192  # pixels; smaller pictures are enlarged by whole factors, unsmoothed


@dataclass
class Sample:
    """One document: PNG of its first picture, task, text in stored order (answers apart)."""

    png: bytes
    task: str
    text: str
    answer: str


def vq_sheet(folder: Path) -> bytes | None:
    """The PNG that training a VQ tokenizer leaves in its folder, if it is there."""
    return (folder / SHEET).read_bytes() if (folder / SHEET).is_file() else None


def samples(data: DataConfig, vocabulary: Vocabulary, vq_folder: Path, per_source: int = 3) -> list[Sample]:
    """The first documents with a picture of each validation (or, without any, training) source."""
    vq = load(vq_folder)
    if not vq.decodes:
        return []
    found = []
    for source in data.validation or data.train:
        if Path(f"{source.path}.json").is_file():
            found += _samples_of(source, vocabulary, vq, per_source)
    return found


def _samples_of(source: SourceConfig, vocabulary: Vocabulary, vq: VQModel, count: int) -> list[Sample]:
    dataset = Dataset(source.path)
    if not dataset.metadata["vq"] or dataset.metadata["vq"]["fingerprint"] != vq.fingerprint:
        return []
    found = []
    for number in range(len(dataset)):
        document = dataset.document(number)
        images = [ids for mode, ids in document if mode == IMAGE]
        if not images or len(found) == count:
            continue
        codes = torch.as_tensor(vocabulary.codes(images[0].astype("int64")))
        texts = [(mode, vocabulary.decode(ids)) for mode, ids in document if mode != IMAGE]
        found.append(
            Sample(
                png=to_png(vq.decode(codes[None])[0]),
                task=source.task,
                text="\n".join(text for mode, text in texts if mode != ANSWER),
                answer="\n".join(text for mode, text in texts if mode == ANSWER),
            )
        )
    return found


def to_png(image: Tensor) -> bytes:
    """An image [3, H, W] in [-1, 1] as PNG."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return enlarged(Image.fromarray(pixels))


def enlarged(picture: Image.Image) -> bytes:
    """A picture as PNG, a small one made larger."""
    factor = -(-_SMALLEST // min(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, "png", optimize=True)
    return stream.getvalue()
