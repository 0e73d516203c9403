"""Parts: a fixed number of samples of a unit, with their texts tokenised and their images listed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, takewhile

import numpy as np

from megatron_ext import chat_template
from megatron_ext.chat_template import ChatTemplate, Segments, Turn
from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT, is_image
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
        skipped: a description of each skipped sample; with "documents", their number, of a sample that has others.
        filtered: number of samples that filters removed.
        missing: number of images that are left out of documents because they are not there.
    """

    name: str
    last: bool
    samples: int
    bytes: int
    documents: list[tuple[str, list[Document]]] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    filtered: int = 0
    missing: int = 0

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
        yield tokenise(part_name(index, done), chunk, not following, options, vocabulary)
        chunk, done = following, done + 1


def tokenise(name: str, samples: list[Sample], last: bool, options: ReadOptions, vocabulary: Vocabulary) -> Part:
    """A part of these samples; samples without text of the required mode, or that the chat template cannot write, are
    skipped."""
    part = Part(name, last, len(samples), sum(sample.bytes for sample in samples))
    part.missing = sum(sample.missing for sample in samples)
    part.filtered = sum(sample.filtered for sample in samples)
    template = chat_template.of(vocabulary) if options.chat_template else None
    with_captions = template is not None and vocabulary.templates.captions == "conversation"
    described, texts = [], []
    for sample in samples:
        if sample.filtered:
            continue
        documents, reason = [], sample.unusable
        if reason is None:
            try:
                if with_captions and sample.is_caption:
                    documents = [_captioned(sample, template)]
                else:
                    documents = _documents(sample, options.split_turns, template)
            except chat_template.UnusableConversation as error:
                reason = str(error)
        described.append((sample, documents, reason))
        texts += [
            item if i == 0 else vocabulary.segment_prefix + item
            for document in documents
            for i, (_, item) in enumerate(document)
            if isinstance(item, str)
        ]
    ids = iter(vocabulary.text.encode(texts))  # all at once: text models take a list in their own threads
    for sample, documents, reason in described:
        encoded = [[(mode, _sequence(item, ids)) for mode, item in document] for document in documents]
        encoded = [[(mode, item) for mode, item in document if len(item)] for document in encoded]
        learnt = (TEXT if with_captions and sample.is_caption else sample.required_mode, DRAWN)
        usable = [document for document in encoded if any(mode in learnt for mode, _ in document)]
        if options.max_tokens and usable:
            whole, reason = len(usable), f"more tokens than --max-tokens {options.max_tokens}"
            usable = [fitting for document in usable if (fitting := _fitting(document, sample, options))]
            if 0 < len(usable) < whole:
                part.skipped.append({"sample": sample.name, "documents": whole - len(usable), "reason": reason})
        if usable:
            part.documents.append((sample.name, usable))
        else:
            part.skipped.append({"sample": sample.name, "reason": reason or "its text is empty"})
    return part


def _documents(sample: Sample, split: bool, template: ChatTemplate | None) -> list[Segments]:
    """The documents of a sample: texts as such, or as token ids where a chat template wrote them."""
    if template and sample.turns:
        turns = conversation_turns(sample)
        conversations = split_conversation(turns) if split else [[turn for turn in turns if turn[1]]]
        return [template.segments(turns) for turns in conversations if turns]
    document = list(sample.segments)
    return split_turns(document) if split and sample.required_mode == ANSWER else [document]


def _fitting(document: Document, sample: Sample, options: ReadOptions) -> Document:
    """The document if its rendering fits ``max_tokens``; the beginning that does if it is interleaved, else nothing.
    Documents without images always fit, since rows may cut them."""
    if not any(is_image(mode) for mode, _ in document) or _length(document, options) <= options.max_tokens:
        return document
    return cut(document, options.max_tokens - 2, options.image_tokens + 2) if sample.required_mode == TEXT else []


def _length(document: Document, options: ReadOptions) -> int:
    """Tokens of a document in the task that renders it longest (``data/rendering.py``)."""
    modes = [mode for mode, _ in document]
    contents = sum(options.image_tokens + 2 if is_image(mode) else len(item) for mode, item in document)  # <boi>, <eoi>
    answers = modes.count(ANSWER)
    followed = sum(pair == (ANSWER, DRAWN) for pair in zip(modes, modes[1:]))  # by <boi> instead of <eod>
    ends = max(1, answers, answers - followed + (modes[-1] == DRAWN))
    return 1 + contents + ends  # <bos>


def cut(document: Document, room: int, image: int) -> Document:
    """The beginning of a document of at most ``room`` tokens, of which an image takes ``image``; no image ends it."""
    kept = []
    for mode, item in document:
        size = image if is_image(mode) else len(item)
        if is_image(mode) and size >= room:
            break
        kept.append((mode, item if is_image(mode) else item[:room]))
        room -= size
        if room <= 0:
            break
    while kept and is_image(kept[-1][0]):
        kept.pop()
    return kept


def _captioned(sample: Sample, template: ChatTemplate) -> Segments:
    """The document of a caption that a chat template writes: context of the pictures, which understanding never
    learns."""
    *images, (_, caption) = sample.segments
    return [*images, (TEXT, template.before_picture(caption))] if caption else []


def _sequence(item, ids: Iterator) -> "np.ndarray | ImageFile":
    """Token ids of a text, the next of ``ids`` where it is not encoded yet; an image as it is."""
    if isinstance(item, ImageFile):
        return item
    return np.asarray(next(ids) if isinstance(item, str) else item, np.int32)


def conversation_turns(sample: Sample) -> list[Turn]:
    """The turns of a conversation that say something, and blank answers, which have no parts.

    Images without a place open the first turn of the user; without such a turn they are one after the instructions.
    """
    segments, turns, unplaced = iter(sample.segments), [], []
    for role, count in sample.turns:
        parts = list(islice(segments, count))
        if not role:
            unplaced = parts
        elif role == "user":
            parts, unplaced = unplaced + parts, []
        if role and (parts or role == "assistant"):
            turns.append((role, parts))
    if unplaced:
        turns.insert(len(_instructions(turns)), ("user", unplaced))
    return turns


def _instructions(turns: list[Turn]) -> list[Turn]:
    """The system turns that open a conversation."""
    return list(takewhile(lambda turn: turn[0] == "system", turns))


def split_conversation(turns: list[Turn]) -> list[list[Turn]]:
    """A conversation for each question with its answer (:func:`split_turns`), each with the instructions before the
    first question. A question with a blank answer leaves its images alone."""
    system = _instructions(turns)
    conversations, images, question = [], [], []
    for role, parts in turns[len(system) :]:
        if role != "assistant":
            question = question + parts
            continue
        if parts:
            conversations.append([*system, ("user", images + question), ("assistant", parts)])
        images, question = images + [(IMAGE, item) for mode, item in question + parts if is_image(mode)], []
    return conversations


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
