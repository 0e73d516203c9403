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

from megatron_ext.data import words
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


class Sheet:
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

    def words(self) -> np.ndarray:
        """The finished words, int32 [tokens]."""
        return self.ids | np.cumsum(self._change[:-1], dtype=np.int32)


@dataclass
class Pieces:
    """What to render: documents, or pieces of them. Every field is [n].

    Attributes:
        document: int64, number in the data set.
        dropped: bool, leave out the text (generation; classifier-free guidance).
        start, stop: int64, the tokens of the rendered document that are wanted.
        place: int64, where on the sheet the first of them goes.
    """

    document: np.ndarray
    dropped: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    place: np.ndarray


def render(sheet: Sheet, dataset: Dataset, pieces: Pieces, task: Task, special: SpecialTokens) -> None:
    """Write pieces of documents on a sheet; each becomes a document of its own there."""
    sequences = _in_order_of_training(Sequences.of(dataset, pieces.document), pieces.dropped, task)
    owner, image, lengths = sequences.owner, sequences.modes == IMAGE, sequences.lengths
    closed = image | (sequences.modes == ANSWER) if task == Task.UNDERSTANDING else image  # by <eoi>, or by <eod>
    before = np.cumsum(image + lengths + closed) - (lengths + closed)  # tokens before each sequence, of any document
    first = np.searchsorted(owner, np.arange(len(pieces.document)))
    begin = 1 + before - (before - image)[first][owner]  # place in the rendered document; bos is at 0
    end = begin + lengths
    last_end = np.maximum.reduceat(end + closed, first)

    def put(owner, position, ids):
        """Tokens at these positions of the rendered documents."""
        wanted = (position >= pieces.start[owner]) & (position < pieces.stop[owner])
        owner = owner[wanted]
        sheet.ids[pieces.place[owner] + position[wanted] - pieces.start[owner]] = ids

    def on_sheet(owner, position):
        """Positions of the rendered documents as places on the sheet, moved to the edge of the piece if outside."""
        return pieces.place[owner] + np.clip(position, pieces.start[owner], pieces.stop[owner]) - pieces.start[owner]

    documents = np.arange(len(pieces.document))
    put(documents, np.zeros_like(documents), special.bos)
    put(owner[image], begin[image] - 1, special.boi)
    put(owner[image], end[image], special.eoi)
    if task == Task.UNDERSTANDING:
        put(owner[closed & ~image], end[closed & ~image], special.eod)
        learnt = (owner, begin, end + 1, closed & ~image)
    else:
        put(documents, last_end, special.eod)
        learnt = (owner, begin, end, image)
    if task == Task.TEXT:
        learnt = (documents, np.ones_like(documents), last_end + 1, np.ones(len(documents), dtype=bool))

    places, stops = on_sheet(owner, begin), on_sheet(owner, end)
    pointers = sequences.pointers + np.maximum(pieces.start[owner] - begin, 0)
    for place, stop, pointer in zip(places.tolist(), stops.tolist(), pointers.tolist()):
        sheet.ids[place:stop] = dataset.tokens[pointer : pointer + stop - place]

    sheet.mark(pieces.place, pieces.place + pieces.stop - pieces.start, task << words.TASK_SHIFT)
    sheet.mark(pieces.place, pieces.place + 1, words.START)
    sheet.mark(places[image], stops[image], words.IMAGE)
    owner, begin, end, chosen = learnt
    begin, end = on_sheet(owner, begin)[chosen], on_sheet(owner, end)[chosen]
    sheet.mark(np.maximum(begin - 1, pieces.place[owner[chosen]]), end - 1, words.LOSS)


@dataclass
class Sequences:
    """The stored sequences of some documents, one document after another. Every field is [sequences].

    Attributes:
        owner: int64, which of the documents it belongs to (0, 1, ...).
        lengths: int64.
        modes: int8.
        pointers: int64, where it starts in ``Dataset.tokens``.
    """

    owner: np.ndarray
    lengths: np.ndarray
    modes: np.ndarray
    pointers: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, documents: np.ndarray) -> "Sequences":
        """Those of ``documents``, int64 [documents]."""
        first = dataset.document_ends[documents]
        counts = dataset.document_ends[documents + 1] - first
        starts = np.cumsum(counts) - counts
        index = np.repeat(first - starts, counts) + np.arange(counts.sum())
        return cls(
            owner=np.repeat(np.arange(len(documents)), counts),
            lengths=dataset.sequence_lengths[index].astype(np.int64),
            modes=dataset.sequence_modes[index],
            pointers=dataset.sequence_pointers[index] // dataset.tokens.itemsize,
        )

    def take(self, index: np.ndarray) -> "Sequences":
        """The sequences at ``index``, in its order."""
        return Sequences(self.owner[index], self.lengths[index], self.modes[index], self.pointers[index])


def _in_order_of_training(sequences: Sequences, dropped: np.ndarray, task: Task) -> Sequences:
    if task != Task.GENERATION:
        return sequences
    image = sequences.modes == IMAGE
    order = np.lexsort((image, np.cumsum(image), sequences.owner))  # texts after their image's number, then the image
    return sequences.take(order[(image | ~dropped[sequences.owner])[order]])


def rendered_lengths(dataset: Dataset, documents: np.ndarray, task: Task, dropped: np.ndarray) -> np.ndarray:
    """Lengths of whole documents as :func:`render` writes them, from the index alone.

    Args:
        documents: int64 [n].
        dropped: bool [n].

    Returns:
        int64 [n].
    """
    sequences = Sequences.of(dataset, documents)
    image = sequences.modes == IMAGE
    lengths = sequences.lengths + 2 * image
    if task == Task.UNDERSTANDING:
        lengths += sequences.modes == ANSWER
    elif task == Task.GENERATION:
        lengths *= image | ~dropped[sequences.owner]
    around = 1 if task == Task.UNDERSTANDING else 2  # bos, and one <eod> (understanding has one per answer instead)
    return np.bincount(sequences.owner, weights=lengths, minlength=len(documents)).astype(np.int64) + around
