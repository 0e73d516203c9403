"""A few documents of the run's data as cards: pictures decoded from their image tokens, with the text beside them."""

from pathlib import Path

import numpy as np
import torch

from megatron_ext.config import DataConfig, SourceConfig
from megatron_ext.data.format import ANSWER, Dataset, is_image
from megatron_ext.report.cards import Card, enlarged
from megatron_ext.vocabulary import Vocabulary
from megatron_ext.vq import VQModel, load
from megatron_ext.vq.pixels import to_picture


def documents(data: DataConfig, vocabulary: Vocabulary, vq_folder: Path, per_source: int = 2) -> list[Card]:
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
        images = [ids for mode, ids in document if is_image(mode)]
        if not images:
            continue
        codes = torch.as_tensor(vocabulary.codes(np.stack(images).astype("int64")))
        lines: list[str] = []
        for mode, ids in document:
            if mode == ANSWER and lines:
                lines[-1] += f" → {vocabulary.decode(ids).strip()}"
            elif not is_image(mode):
                lines.append(vocabulary.decode(ids).strip())
        png = enlarged(to_picture(torch.cat(list(vq.decode(codes)), dim=-1)))  # side by side
        words = "a picture" if len(images) == 1 else f"{len(images)} pictures"
        cards.append(Card(png, f"{words} decoded from image tokens", "\n".join(lines), label=source.task))
    return cards
