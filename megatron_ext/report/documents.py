"""A few documents of the run's data as cards: pictures decoded from their image tokens, with the text beside them."""

import io
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from megatron_ext.config import DataConfig, SourceConfig
from megatron_ext.data.format import ANSWER, IMAGE, Dataset
from megatron_ext.vocabulary import Vocabulary
from megatron_ext.vq import VQModel, load
from megatron_ext.vq.pixels import to_picture

_MIN_SIZE = 192  # pixels; smaller pictures are enlarged by whole factors, unsmoothed


class Card(NamedTuple):
    """A picture with a text: PNG, task, text."""

    png: bytes
    task: str
    text: str


def documents(data: DataConfig, vocabulary: Vocabulary, vq_folder: Path, per_source: int = 3) -> list[Card]:
    """The first documents with a picture of each validation (or, without validation data, training) source."""
    vq = load(vq_folder)
    if not vq.decodes:
        return []
    sources = [source for source in data.validation or data.train if Path(f"{source.path}.json").is_file()]
    return [card for source in sources for card in _documents_of(source, vocabulary, vq, per_source)]


def _documents_of(source: SourceConfig, vocabulary: Vocabulary, vq: VQModel, count: int) -> list[Card]:
    dataset = Dataset(source.path)
    if not dataset.metadata["vq"] or dataset.metadata["vq"]["fingerprint"] != vq.fingerprint:
        return []
    cards = []
    for n in range(len(dataset)):
        if len(cards) == count:
            break
        document = dataset.document(n)
        images = [ids for mode, ids in document if mode == IMAGE]
        if not images:
            continue
        codes = torch.as_tensor(vocabulary.codes(images[0].astype("int64")))
        texts = [(mode, vocabulary.decode(ids)) for mode, ids in document if mode != IMAGE]
        lines = [text for mode, text in texts if mode != ANSWER and text]
        answer = "\n".join(text for mode, text in texts if mode == ANSWER)
        cards.append(
            Card(enlarged(to_picture(vq.decode(codes[None])[0])), source.task, "\n".join([*lines, f"→ {answer}"]))
        )
    return cards


def enlarged(picture: Image.Image) -> bytes:
    """PNG of a picture, enlarged if it is small."""
    factor = -(-_MIN_SIZE // min(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, "png", optimize=True)
    return stream.getvalue()
