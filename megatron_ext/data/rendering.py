"""Stored documents and a task -> the sequences to train on.

::

    stored          [image] [question] [answer] [question] [answer]
    understanding   bos <boi> codes <eoi> question ANSWER <eod> question ANSWER <eod>     learnt: ANSWER and <eod>
    stored          [image] [caption]
    generation      bos caption <boi> CODES <eoi> <eod>                                   learnt: CODES
      dropped       bos <boi> CODES <eoi> <eod>
    stored          [text]
    text            bos TEXT <eod>                                                        learnt: all after bos

For generation every image comes after the text that follows it in stored order, up to the next image; text before the
first image stays in front. A learnt token is one whose prediction counts: the loss bit is set at the token *before* it.

Many documents are rendered together: Python loops over sequences only to copy them, all else is vectorised.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ext.data import packed_tokens
from megatron_ext.data.format import ANSWER, IMAGE, Dataset
from megatron_ext.token_classes import Task


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that rendering adds (the part of a ``Vocabulary`` that worker processes need)."""

    bos: int
    pad: int
    eod: int
    boi: int
    eoi: int

    @classmethod
    def of(cls, vocabulary) -> "SpecialTokens":
        """Those of a :class:`~megatron_ext.vocabulary.Vocabulary`."""
        return cls(vocabulary.bos, vocabulary.pad, vocabulary.eod, vocabulary.boi, vocabulary.eoi)


class TokenBuffer:
    """Words while documents are being written on them.

    Attributes:
        ids: int32 [tokens].
    """

    def __init__(self, tokens: int, fill: int):
        self.ids = np.full(tokens, fill, dtype=np.int32)
        self._change = np.zeros(tokens + 1, dtype=np.int32)  # bits that begin here, minus those that end

    def mark(self, begin: np.ndarray, end: np.ndarray, bits: int) -> None:
        """Set ``bits`` on the (disjoint) ranges ``begin`` to ``end``, int64 [ranges] each; empty ones are skipped."""
        some = begin < end
        self._change[begin[some]] += bits
        self._change[end[some]] -= bits

    def packed_tokens(self) -> np.ndarray:
        """The finished packed tokens, int32 [tokens]."""
        return self.ids | np.cumsum(self._change[:-1], dtype=np.int32)


@dataclass
class Pieces:
    """What to render: documents, or pieces of them. Every field is [n].

    Attributes:
        document: int64, number in the data set.
        dropped: bool, leave out the text (generation; classifier-free guidance).
        start, stop: int64, the tokens of the rendered document that are wanted.
        place: int64, where in the buffer the first of them goes.
    """

    document: np.ndarray
    dropped: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    place: np.ndarray


@dataclass
class Layout:
    """Where the stored sequences of some documents go in the rendered ones, one document after another.

    Attributes:
        owner: int64 [sequences], which of the documents it belongs to (0, 1, ...).
        image, answer: bool [sequences], what it is.
        pointer: int64 [sequences], where it starts in ``Dataset.tokens``.
        begin, end: int64 [sequences], its place in the rendered document, without ``<boi>``, ``<eoi>`` and ``<eod>``.
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
        dropped: bool [documents], leave out the text (generation; classifier-free guidance).
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
    closed = image | answer if task == Task.UNDERSTANDING else image  # by <eoi>; by <eod>
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
        length=1 + after[last] - before + (task != Task.UNDERSTANDING),  # there each answer has its own <eod>
    )


def render(buffer: TokenBuffer, dataset: Dataset, pieces: Pieces, task: Task, special: SpecialTokens) -> None:
    """Write pieces of documents into a buffer; each becomes a document of its own there."""
    layout = lay_out(dataset, pieces.document, pieces.dropped, task)
    owner, image, begin, end = layout.owner, layout.image, layout.begin, layout.end
    documents = np.arange(len(pieces.document))

    def in_buffer(owner, position):
        """Positions in rendered documents as places in the buffer, moved to the edge of the piece if outside."""
        return pieces.place[owner] + np.clip(position, pieces.start[owner], pieces.stop[owner]) - pieces.start[owner]

    def put(owner, position, token):
        inside = (position >= pieces.start[owner]) & (position < pieces.stop[owner])
        buffer.ids[in_buffer(owner, position)[inside]] = token

    put(documents, np.zeros_like(documents), special.bos)
    put(owner[image], begin[image] - 1, special.boi)
    put(owner[image], end[image], special.eoi)
    if task == Task.UNDERSTANDING:
        learner, learnt, until = owner[layout.answer], begin[layout.answer], end[layout.answer] + 1
        put(learner, until - 1, special.eod)
    else:
        put(documents, layout.length - 1, special.eod)
        if task == Task.GENERATION:
            learner, learnt, until = owner[image], begin[image], end[image]
        else:
            learner, learnt, until = documents, np.ones_like(documents), layout.length

    places, stops = in_buffer(owner, begin), in_buffer(owner, end)
    pointers = layout.pointer + np.maximum(pieces.start[owner] - begin, 0)
    for place, stop, pointer in zip(places.tolist(), stops.tolist(), pointers.tolist()):
        buffer.ids[place:stop] = dataset.tokens[pointer : pointer + stop - place]

    buffer.mark(pieces.place, pieces.place + pieces.stop - pieces.start, task << packed_tokens.TASK_SHIFT)
    buffer.mark(pieces.place, pieces.place + 1, packed_tokens.START)
    buffer.mark(places[image], stops[image], packed_tokens.IMAGE)
    predicting = np.maximum(in_buffer(learner, learnt) - 1, pieces.place[learner])
    buffer.mark(predicting, in_buffer(learner, until) - 1, packed_tokens.LOSS)
