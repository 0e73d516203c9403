"""What packed rows hold, from the lengths of their documents: all that their work depends on, but no token of them."""

from dataclasses import dataclass, fields

import numpy as np

from megatron_ext.data.format import Dataset
from megatron_ext.data.rendering import DocumentPieces, lay_out, learnt_ranges
from megatron_ext.token_classes import Layout, Modality, Task


@dataclass(frozen=True)
class RowContents:
    """The contents of some rows, as runs of tokens of one class; runs are in the order of their document.

    Attributes:
        row: int64 [runs], the row of each run, counted from the first of these rows.
        document: int64 [runs], number of its document, 0, 1, ... over all rows.
        task, modality: int64 [runs], class of its tokens.
        length: int64 [runs], number of its tokens; it may be 0.
        learnt: int64 [rows], tokens whose loss counts.
        learnt_images: int64 [rows], those of them that predict image tokens.
    """

    row: np.ndarray
    document: np.ndarray
    task: np.ndarray
    modality: np.ndarray
    length: np.ndarray
    learnt: np.ndarray
    learnt_images: np.ndarray

    @classmethod
    def joined(cls, parts: list["RowContents"], rows: int) -> "RowContents":
        """The contents of ``rows`` rows from :func:`contents_of` parts of their documents."""
        values = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        ends = np.cumsum([0, *(part.document[-1] + 1 for part in parts)])
        values["document"] = [document + end for document, end in zip(values["document"], ends)]
        joined = {name: np.concatenate(arrays) for name, arrays in values.items()}
        documents = joined["row"][np.flatnonzero(np.diff(joined["document"], prepend=-1))]
        for name in ("learnt", "learnt_images"):
            joined[name] = np.bincount(documents, joined[name], rows).astype(np.int64)
        return cls(**joined)


def contents_of(dataset: Dataset, pieces: DocumentPieces, layout: Layout, generation_text: bool) -> RowContents:
    """The contents of document pieces whose ``place`` is their row, with ``learnt`` and ``learnt_images`` by document
    instead of by row."""
    places = lay_out(dataset, pieces.document, pieces.dropped, layout)
    count, image = len(pieces.document), places.image
    owner, begin, end, drawn = (field[image] for field in (places.owner, places.begin, places.end, places.drawn))
    documents, images = np.arange(count), np.bincount(owner, minlength=count)
    # The runs of a document: the text before each image, the image; the text at the end. One with images is not cut.
    place = 2 * np.arange(len(owner)) + owner
    last = 2 * np.cumsum(images) + documents
    before = np.zeros_like(begin)
    before[1:] = np.where(owner[1:] == owner[:-1], end[:-1], 0)
    ended = np.zeros(count, dtype=np.int64)
    ended[owner] = end  # of the last image: a later assignment wins
    length = np.empty(2 * len(owner) + count, dtype=np.int64)
    length[place], length[place + 1], length[last] = begin - before, end - begin, pieces.stop - pieces.start - ended
    modality = np.full(len(length), int(Modality.TEXT))
    modality[place + 1] = Modality.IMAGE
    interleaved = layout == Layout.INTERLEAVED
    task = np.full(len(length), int(Task.UNDERSTANDING if interleaved else Task(layout)))
    task[place[drawn & interleaved] + 1] = Task.GENERATION
    document = np.repeat(documents, 2 * images + 1)
    learnt_owner, learnt_begin, learnt_end = learnt_ranges(places, layout, generation_text, pieces.dropped)
    start, stop = pieces.start[learnt_owner], pieces.stop[learnt_owner]
    # Each is predicted by the token before it, which is in the same piece.
    tokens = np.clip(learnt_end, start + 1, stop) - np.clip(learnt_begin, start + 1, stop)
    predicted = end - begin if layout == Layout.GENERATION else np.where(drawn & interleaved, end - begin, 0)
    return RowContents(
        row=pieces.place[document],
        document=document,
        task=task,
        modality=modality,
        length=length,
        learnt=np.bincount(learnt_owner, tokens, count),
        learnt_images=np.bincount(owner, predicted, count),
    )
