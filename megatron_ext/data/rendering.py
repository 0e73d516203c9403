"""Rendering: stored documents and a task -> the token sequences to train on.

::

    stored          [image] [question] [answer] [question] [answer]
    understanding   bos <boi> codes <eoi> question ANSWER <eod> question ANSWER <eod>     learnt: ANSWER and <eod>
    stored          [image] [caption]
    generation      bos caption <boi> CODES <eoi> <eod>                                   learnt: CODES
      dropped       bos <boi> CODES <eoi> <eod>
    stored          [text]
    text            bos TEXT <eod>                                                        learnt: all after bos

For generation each image moves behind the text that follows it in stored order, up to the next image; text before the
first image stays in front. ``<eod>`` after an answer is the vocabulary's ``answer_end``, where that is another token.
A learnt token is one whose prediction counts: the loss bit is set at the token *before* it.

Many documents are rendered together: Python loops over sequences only to copy them, the rest is vectorised.
"""

from dataclasses import dataclass, fields

import numpy as np

from megatron_ext.data import packed_tokens
from megatron_ext.data.format import ANSWER, IMAGE, Dataset
from megatron_ext.token_classes import Task


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of special tokens (the part of a ``Vocabulary`` that worker processes need)."""

    bos: int
    pad: int
    eod: int
    boi: int
    eoi: int
    answer_end: int

    @classmethod
    def of(cls, vocabulary) -> "SpecialTokens":
        """The special tokens of a :class:`~megatron_ext.vocabulary.Vocabulary`."""
        return cls(**{field.name: getattr(vocabulary, field.name) for field in fields(cls)})


class TokenBuffer:
    """Packed tokens under construction: documents are written into it, then :meth:`packed_tokens` is read.

    Attributes:
        ids: int32 [tokens].
    """

    def __init__(self, tokens: int, fill: int):
        self.ids = np.full(tokens, fill, dtype=np.int32)
        self._change = np.zeros(tokens + 1, dtype=np.int32)  # bits that begin here, minus those that end

    def mark(self, begin: np.ndarray, end: np.ndarray, bits: int) -> None:
        """Set ``bits`` on the (disjoint) ranges ``begin`` to ``end``, int64 [ranges] each; empty ones are skipped."""
        nonempty = begin < end
        self._change[begin[nonempty]] += bits
        self._change[end[nonempty]] -= bits

    def packed_tokens(self) -> np.ndarray:
        """The finished packed tokens, int32 [tokens]."""
        return self.ids | np.cumsum(self._change[:-1], dtype=np.int32)


@dataclass
class DocumentPieces:
    """Documents to render, or pieces of documents. Every field is [n].

    Attributes:
        document: int64, number in the data set.
        dropped: bool, leave out the text (generation; for classifier-free guidance).
        start, stop: int64, range of tokens of the rendered document.
        place: int64, position of the first of these tokens in the buffer.
    """

    document: np.ndarray
    dropped: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    place: np.ndarray


@dataclass
class Layout:
    """Positions of the stored sequences in their rendered documents, document by document.

    Attributes:
        owner: int64 [sequences], index of the sequence's document (0, 1, ...).
        image, answer: bool [sequences], whether the sequence is an image, an answer.
        pointer: int64 [sequences], start of the sequence in ``Dataset.tokens``.
        begin, end: int64 [sequences], range in the rendered document, without ``<boi>``, ``<eoi>`` and ``<eod>``.
        length: int64 [documents], tokens of the rendered document.
    """

    owner: np.ndarray
    image: np.ndarray
    answer: np.ndarray
    pointer: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    length: np.ndarray


def lay_out(dataset: Dataset, documents: np.ndarray, dropped: np.ndarray, task: Task) -> Layout:
    """Lay documents out for a task, from the index alone.

    Args:
        documents: int64 [documents], numbers in the data set.
        dropped: bool [documents], leave out the text (generation; for classifier-free guidance).
    """
    first = dataset.document_ends[documents]
    counts = dataset.document_ends[documents + 1] - first
    owner = np.repeat(np.arange(len(documents)), counts)
    index = np.arange(len(owner)) + np.repeat(first - np.cumsum(counts) + counts, counts)
    if task == Task.GENERATION:
        image = dataset.sequence_modes[index] == IMAGE
        # Per document: the texts before image 1, then texts and image 1, texts and image 2, ...
        order = np.argsort(2 * (owner + np.cumsum(image)) + image, kind="stable")
        order = order[(image | ~dropped[owner])[order]]
        owner, index = owner[order], index[order]
    modes, lengths = dataset.sequence_modes[index], dataset.sequence_lengths[index].astype(np.int64)
    image, answer = modes == IMAGE, modes == ANSWER
    closed = image | answer if task == Task.UNDERSTANDING else image  # images by <eoi>, answers by <eod>
    after = np.cumsum(image + lengths + closed)  # tokens up to each sequence's end, of all documents together
    last = np.searchsorted(owner, np.arange(len(documents)), side="right") - 1
    before = np.concatenate([[0], after[last[:-1]]])  # ... up to each document's start
    end = 1 + after - closed - before[owner]  # bos is at 0
    return Layout(
        owner=owner,
        image=image,
        answer=answer,
        pointer=dataset.sequence_pointers[index] // dataset.tokens.itemsize,
        begin=end - lengths,
        end=end,
        length=1
        + after[last]
        - before
        + (task != Task.UNDERSTANDING),  # in understanding each answer has its own <eod>
    )


def render(buffer: TokenBuffer, dataset: Dataset, pieces: DocumentPieces, task: Task, special: SpecialTokens) -> None:
    """Write document pieces into a buffer, each as a document of its own."""
    layout = lay_out(dataset, pieces.document, pieces.dropped, task)
    owner, image, begin, end = layout.owner, layout.image, layout.begin, layout.end
    documents = np.arange(len(pieces.document))

    def buffer_place(owner, position):
        """Positions in rendered documents as places in the buffer, clipped to the piece."""
        return pieces.place[owner] + np.clip(position, pieces.start[owner], pieces.stop[owner]) - pieces.start[owner]

    def put(owner, position, token):
        inside = (position >= pieces.start[owner]) & (position < pieces.stop[owner])
        buffer.ids[buffer_place(owner, position)[inside]] = token

    put(documents, np.zeros_like(documents), special.bos)
    put(owner[image], begin[image] - 1, special.boi)
    put(owner[image], end[image], special.eoi)
    if task == Task.UNDERSTANDING:
        learnt_owner, learnt_begin, learnt_end = owner[layout.answer], begin[layout.answer], end[layout.answer] + 1
        put(learnt_owner, learnt_end - 1, special.answer_end)
    else:
        put(documents, layout.length - 1, special.eod)
        if task == Task.GENERATION:
            learnt_owner, learnt_begin, learnt_end = owner[image], begin[image], end[image]
        else:
            learnt_owner, learnt_begin, learnt_end = documents, np.ones_like(documents), layout.length

    places, stops = buffer_place(owner, begin), buffer_place(owner, end)
    pointers = layout.pointer + np.maximum(pieces.start[owner] - begin, 0)
    for place, stop, pointer in zip(places.tolist(), stops.tolist(), pointers.tolist()):
        buffer.ids[place:stop] = dataset.tokens[pointer : pointer + stop - place]

    buffer.mark(pieces.place, pieces.place + pieces.stop - pieces.start, task << packed_tokens.TASK_SHIFT)
    buffer.mark(pieces.place, pieces.place + 1, packed_tokens.START)
    buffer.mark(places[image], stops[image], packed_tokens.IMAGE)
    predicting = np.maximum(buffer_place(learnt_owner, learnt_begin) - 1, pieces.place[learnt_owner])
    buffer.mark(predicting, buffer_place(learnt_owner, learnt_end) - 1, packed_tokens.LOSS)
