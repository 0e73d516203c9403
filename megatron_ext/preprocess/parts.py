"""Parts: a fixed number of samples of a unit, with their texts tokenised and their images listed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import numpy as np

from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, is_image
from megatron_ext.preprocess import units
from megatron_ext.preprocess.samples import ImageFile, ReadOptions, Sample, Unit
from megatron_ext.vocabulary import Vocabulary

Document = list[tuple[int, "np.ndarray | ImageFile"]]
"""(mode, token ids) and (IMAGE or DRAWN, ImageFile)."""


@dataclass
class Part:
    """Samples that are encoded and written together.

    Attributes:
        name: name of its files in the store.
        last: whether it is the last part of its unit.
        samples: number of samples, unusable ones included.
        bytes: size of the samples in the input.
        documents: name and documents of each usable sample.
        skipped: a description of each skipped sample.
    """

    name: str
    last: bool
    samples: int
    bytes: int
    documents: list[tuple[str, list[Document]]] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)

    @cached_property
    def images(self) -> list[ImageFile]:
        """Every image once, in order of appearance."""
        documents = (document for _, documents in self.documents for document in documents)
        return list(dict.fromkeys(item for document in documents for mode, item in document if is_image(mode)))


def part_name(unit: int, part: int) -> str:
    """Name of a part; names sort in the order of parts, up to 10^6 units of 10^4 parts."""
    return f"{unit:06d}-{part:04d}"


def unit_parts(
    index: int, unit: Unit, done: int, part_samples: int, options: ReadOptions, vocabulary: Vocabulary
) -> Iterator[Part]:
    """The parts of a unit after the first ``done``; a unit without samples is one empty part."""
    samples = units.read(unit, options, skip=done * part_samples)
    chunk = list(islice(samples, part_samples))
    while chunk or not done:
        following = list(islice(samples, part_samples))
        yield tokenise(part_name(index, done), chunk, not following, options.split_turns, vocabulary)
        chunk, done = following, done + 1


def tokenise(name: str, samples: list[Sample], last: bool, split: bool, vocabulary: Vocabulary) -> Part:
    """A part of these samples; samples without text of the required mode are skipped.

    Args:
        split: each question with its answer is a document of its own (:func:`split_turns`).
    """
    part = Part(name, last, len(samples), sum(sample.bytes for sample in samples))
    texts = [item for sample in samples for mode, item in sample.segments if not is_image(mode)]
    ids = iter(vocabulary.text.encode(texts))  # all at once: SentencePiece takes a list in its own threads
    for sample in samples:
        document = [
            (mode, item if is_image(mode) else np.asarray(next(ids), np.int32)) for mode, item in sample.segments
        ]
        document = [(mode, item) for mode, item in document if len(item)]
        reason = sample.unusable
        if reason is None and not any(mode in (sample.required_mode, DRAWN) for mode, _ in document):
            reason = "its text is empty"
        if reason is None:
            conversation = split and sample.required_mode == ANSWER
            part.documents.append((sample.name, split_turns(document) if conversation else [document]))
        else:
            part.skipped.append({"sample": sample.name, "reason": reason})
    return part


def split_turns(document: Document) -> list[Document]:
    """A document for each question with its answer, which may be a drawn image, after the images of the turns before
    it, which are given there; what follows the last answer is left out."""
    turns, images, turn = [], [], []
    for (mode, item), (following, _) in zip(document, [*document[1:], (None, None)]):
        turn.append((mode, item))
        if mode in (ANSWER, DRAWN) and following not in (ANSWER, DRAWN):
            turns.append(images + turn)
            images = images + [(IMAGE, image) for of_image, image in turn if is_image(of_image)]
            turn = []
    return turns
