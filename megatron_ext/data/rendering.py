"""Rendering: stored documents and a layout -> the token sequences to train on.

::

    stored          [image] [question] [answer] [question] [answer]
    understanding   bos <boi> codes <eoi> question ANSWER <eod> question ANSWER <eod>     learnt: ANSWER and <eod>
    stored          [image] [caption]
    generation      bos caption <boi> CODES <eoi> <eod>                                   learnt: CODES
      dropped       bos <boi> CODES <eoi> <eod>
      with generation_text                          learnt: <boi>, unless the caption is dropped, CODES, <eoi>, <eod>
    stored          [text]
    text            bos TEXT <eod>                                                        learnt: all after bos
    stored          [image] [instruction] [drawn image] [question] [answer] [instruction] [drawn image]
    interleaved     bos <boi> codes <eoi> instruction <BOI> CODES <eoi> question ANSWER <eod>
                    instruction <BOI> CODES <eoi> <eod>             learnt: ANSWER and <eod>; CODES and their <boi>
      dropped       all images without the texts, if there is no answer
    stored          [text] [image] [text]
    interleaved     bos TEXT <boi> codes <eoi> TEXT <eod>                                 learnt: TEXT, <eod> after it

For generation each image moves behind the text that follows it in stored order, up to the next image; text before the
first image stays in front. Interleaved documents stay as stored: a drawn image is learnt where it stands, and so is the
``<boi>`` before it, the decision to draw. An answer that ends in a drawn image has no ``<eod>`` of its own. Without
drawn images an interleaved document with answers equals one of understanding. With neither, it is a text with images,
and all the text is learnt. ``<eod>`` after an answer is the vocabulary's ``answer_end``, where that is another token.

A learnt token is one whose prediction counts: the loss bit is set at the token *before* it.

Many documents are rendered together: Python loops over sequences only to copy them, the rest is vectorised.
"""

from dataclasses import dataclass, fields

import numpy as np

from megatron_ext.data import packed_tokens
from megatron_ext.data.format import ANSWER, DRAWN, Dataset, is_image
from megatron_ext.data.vq_metadata import codes_of_image
from megatron_ext.token_classes import Layout, Task


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

    @property
    def image_offset(self) -> int:
        """Id of VQ code 0: the codes follow the special tokens, of which ``<eoi>`` is the last."""
        return self.eoi + 1


class TokenBuffer:
    """Packed tokens under construction: documents are written into it, then :meth:`packed_tokens` is read.

    Args:
        depth: D, codes of an image token.

    Attributes:
        ids: int32 [tokens], of an image token that of its first code.
        further_codes: the other codes of image tokens, uint16 [tokens, 2 * (D // 2)].
    """

    def __init__(self, tokens: int, fill: int, depth: int = 1):
        self.ids = np.full(tokens, fill, dtype=np.int32)
        self.further_codes = np.zeros((tokens, 2 * (depth // 2)), dtype="<u2")
        self._change = np.zeros(tokens + 1, dtype=np.int32)  # bits that begin here, minus those that end

    def mark(self, begin: np.ndarray, end: np.ndarray, bits: int) -> None:
        """Set ``bits`` on the (disjoint) ranges ``begin`` to ``end``, int64 [ranges] each; empty ones are skipped."""
        nonempty = begin < end
        self._change[begin[nonempty]] += bits
        self._change[end[nonempty]] -= bits

    def packed_tokens(self, rows: int) -> np.ndarray:
        """The finished packed tokens in rows of equal length s, int32 [rows, (1 + D // 2) * s]."""
        packed = (self.ids | np.cumsum(self._change[:-1], dtype=np.int32)).reshape(rows, -1)
        if not self.further_codes.size:
            return packed
        return np.concatenate([packed, self.further_codes.view("<i4").reshape(rows, -1)], axis=1)


@dataclass
class DocumentPieces:
    """Documents to render, or pieces of documents. Every field is [n].

    Attributes:
        document: int64, number in the data set.
        dropped: bool, leave out the text (for classifier-free guidance).
        start, stop: int64, range of tokens of the rendered document.
        place: int64, position of the first of these tokens in the buffer.
    """

    document: np.ndarray
    dropped: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    place: np.ndarray


@dataclass
class SequencePlaces:
    """Places of the stored sequences in their rendered documents, document by document.

    Attributes:
        owner: int64 [sequences], index of the sequence's document (0, 1, ...).
        image, drawn, answer: bool [sequences], whether the sequence is an image, an image to be drawn, an answer.
        plain: bool [sequences], whether it is text of an interleaved document without answers and drawn images.
        closed: bool [sequences], whether ``<eoi>`` (an image) or ``<eod>`` (an answer) follows.
        pointer: int64 [sequences], start of the sequence in ``Dataset.tokens``.
        begin, end: int64 [sequences], range in the rendered document, without ``<boi>``, ``<eoi>`` and ``<eod>``.
        length: int64 [documents], tokens of the rendered document.
        ended: bool [documents], whether an ``<eod>`` of its own ends the document.
    """

    owner: np.ndarray
    image: np.ndarray
    drawn: np.ndarray
    answer: np.ndarray
    plain: np.ndarray
    closed: np.ndarray
    pointer: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    length: np.ndarray
    ended: np.ndarray


def text_may_drop(dataset: Dataset, documents: np.ndarray, layout: Layout) -> np.ndarray:
    """Whether caption dropout applies to documents, bool [documents]: what is learnt in them is images alone."""
    if layout != Layout.INTERLEAVED:
        return np.full(len(documents), layout == Layout.GENERATION)
    owner, index = _sequences(dataset, documents)
    modes = dataset.sequence_modes[index]
    drawn, answers = (np.bincount(owner, modes == mode, len(documents)) for mode in (DRAWN, ANSWER))
    return (drawn > 0) & (answers == 0)


def lay_out(dataset: Dataset, documents: np.ndarray, dropped: np.ndarray, layout: Layout) -> SequencePlaces:
    """Lay documents out, from the index alone.

    Args:
        documents: int64 [documents], numbers in the data set.
        dropped: bool [documents], leave out the text (for classifier-free guidance).
    """
    owner, index = _sequences(dataset, documents)
    image = is_image(dataset.sequence_modes[index])
    if layout == Layout.GENERATION:
        # Per document: the texts before image 1, then texts and image 1, texts and image 2, ...
        order = np.argsort(2 * (owner + np.cumsum(image)) + image, kind="stable")
        owner, index, image = owner[order], index[order], image[order]
    kept = image | ~dropped[owner]
    owner, index, image = owner[kept], index[kept], image[kept]
    modes, lengths = dataset.sequence_modes[index], dataset.token_counts(index).astype(np.int64)
    drawn, answer = modes == DRAWN, modes == ANSWER
    last = np.searchsorted(owner, np.arange(len(documents)), side="right") - 1
    plain = (np.bincount(owner, drawn | answer, len(documents)) == 0) & (layout == Layout.INTERLEAVED)
    if layout in (Layout.UNDERSTANDING, Layout.INTERLEAVED):
        before_drawn = np.append(drawn[1:] & (owner[1:] == owner[:-1]), False)
        closed = image | answer & ~(before_drawn & (layout == Layout.INTERLEAVED))
        ended = drawn[last] & (layout == Layout.INTERLEAVED) | plain
    else:
        closed, ended = image, np.ones(len(documents), dtype=bool)
    after = np.cumsum(image + lengths + closed)  # tokens up to each sequence's end, of all documents together
    before = np.concatenate([[0], after[last[:-1]]])  # ... up to each document's start
    end = 1 + after - closed - before[owner]  # bos is at 0
    return SequencePlaces(
        owner=owner,
        image=image,
        drawn=drawn,
        answer=answer,
        plain=plain[owner] & ~image,
        closed=closed,
        pointer=dataset.sequence_pointers[index] // dataset.tokens.itemsize,
        begin=end - lengths,
        end=end,
        length=1 + after[last] - before + ended,
        ended=ended,
    )


def _sequences(dataset: Dataset, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owner (0, 1, ...) and number in the data set of each sequence of the documents, in stored order."""
    first = dataset.document_ends[documents]
    counts = dataset.document_ends[documents + 1] - first
    owner = np.repeat(np.arange(len(documents)), counts)
    return owner, np.arange(len(owner)) + np.repeat(first - np.cumsum(counts) + counts, counts)


def render(
    buffer: TokenBuffer,
    dataset: Dataset,
    pieces: DocumentPieces,
    layout: Layout,
    special: SpecialTokens,
    generation_text: bool = False,
) -> None:
    """Write document pieces into a buffer, each as a document of its own.

    Args:
        generation_text: generation documents also learn the special tokens around their images.
    """
    places = lay_out(dataset, pieces.document, pieces.dropped, layout)
    owner, image, begin, end = places.owner, places.image, places.begin, places.end
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
    closed_answer = places.answer & places.closed
    put(owner[closed_answer], end[closed_answer], special.answer_end)
    put(documents[places.ended], places.length[places.ended] - 1, special.eod)
    learnt_owner, learnt_begin, learnt_end = learnt_ranges(places, layout, generation_text, pieces.dropped)

    starts, stops = buffer_place(owner, begin), buffer_place(owner, end)
    pointers = places.pointer + np.maximum(pieces.start[owner] - begin, 0)
    if dataset.depth > 1:
        _copy_images(buffer, dataset, starts[image], pointers[image], special.image_offset)
    copied = slice(None) if dataset.depth == 1 else ~image
    first, begins, ends = pointers[copied], starts[copied], stops[copied]
    stored = dataset.ranges(first, first + ends - begins)
    for place, stop, ids in zip(begins.tolist(), ends.tolist(), stored):
        buffer.ids[place:stop] = ids

    task = Task.UNDERSTANDING if layout == Layout.INTERLEAVED else Task(layout)
    buffer.mark(pieces.place, pieces.place + pieces.stop - pieces.start, task << packed_tokens.TASK_SHIFT)
    if layout == Layout.INTERLEAVED:
        drawn = places.drawn
        buffer.mark(starts[drawn], stops[drawn], (Task.GENERATION - task) << packed_tokens.TASK_SHIFT)
    buffer.mark(pieces.place, pieces.place + 1, packed_tokens.START)
    buffer.mark(starts[image], stops[image], packed_tokens.IMAGE)
    predicting = np.maximum(buffer_place(learnt_owner, learnt_begin) - 1, pieces.place[learnt_owner])
    buffer.mark(predicting, buffer_place(learnt_owner, learnt_end) - 1, packed_tokens.LOSS)


def _copy_images(
    buffer: TokenBuffer, dataset: Dataset, starts: np.ndarray, pointers: np.ndarray, image_offset: int
) -> None:
    """Write images of several codes a token, which are never cut, into a buffer: places and pointers, [images] each."""
    count = codes_of_image(dataset.metadata["vq"])
    for place, stored in zip(starts.tolist(), dataset.ranges(pointers, pointers + count)):
        ids = stored.reshape(-1, dataset.depth)
        stop = place + len(ids)
        buffer.ids[place:stop] = ids[:, 0]
        buffer.further_codes[place:stop, : dataset.depth - 1] = ids[:, 1:] - image_offset


def learnt_ranges(
    places: SequencePlaces, layout: Layout, generation_text: bool, dropped: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Owner, begin and end in the rendered document of each range of learnt tokens; ranges are disjoint."""
    if layout == Layout.TEXT:
        documents = np.arange(len(places.length))
        return documents, np.ones_like(documents), places.length
    if layout == Layout.GENERATION and generation_text:
        owner, begin, end = (field[places.image] for field in (places.owner, places.begin, places.end))
        last = end + 2 == places.length[owner]  # <eod> follows <eoi>
        return owner, begin - ~dropped[owner], end + 1 + last
    if layout == Layout.GENERATION:
        learnt = places.image
    else:
        learnt = places.answer | places.plain | places.drawn & (layout == Layout.INTERLEAVED)
    boi = places.drawn[learnt] & (layout == Layout.INTERLEAVED)
    last = np.append(places.owner[1:] != places.owner[:-1], True)  # of its document
    eod = places.answer & places.closed | places.plain & last
    return places.owner[learnt], places.begin[learnt] - boi, places.end[learnt] + eod[learnt]
