"""Packed rows, each a pure function of its number.

Samples are packed in blocks of ``BLOCK``, each block independently, so finding row r only requires the number of rows
of the blocks before it (about 1 s for a million documents). The number of the next row is the whole state to save: the
same rows follow under any number of replicas.

A document without images that is longer than a row is cut into pieces, each a document of its own. A piece begins with
the last token of the previous piece, so every token is still predicted exactly once. Pieces that fill a row alone are
spread at random over their block, or over a part of it that is well inside an epoch; all other rows keep the order of
their samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_ext.config import DataConfig
from megatron_ext.data import counter_random, packed_tokens, reading
from megatron_ext.data.batch import Batch
from megatron_ext.data.mixture import Mixture, Samples, by_source
from megatron_ext.data.packed_tokens import unpack
from megatron_ext.data.packing import pack
from megatron_ext.data.rendering import DocumentPieces, TokenBuffer, render
from megatron_ext.data.row_contents import RowContents, contents_of
from megatron_ext.data.source import Source

BLOCK = 4096
"""Samples packed together. The rows depend on it: with another value a run does not resume exactly."""

NO_ROW = -1
"""Stands for a row of padding among the numbers of rows."""

_MOST_PIECES = 64 * BLOCK  # approximate number per chunk; affects only speed and memory
_PIECES = 3  # purpose of random numbers


@dataclass
class _Chunk:
    """The rows of some consecutive blocks: row i of the chunk holds the items ``ends[i]`` to ``ends[i + 1]``."""

    samples: Samples
    ends: np.ndarray  # [rows + 1]
    sample: np.ndarray  # [items], index of the document's sample
    piece: np.ndarray  # [items], number of the piece of a cut document

    @property
    def rows(self) -> int:
        return len(self.ends) - 1


class PackedRows:
    """An endless sequence of rows of exactly ``length`` tokens. ::

        rows = PackedRows(mixture, 512)
        rows[7]               # row 7 as a Batch of one row
        rows.batch(0, 256)    # rows 0 to 255 as a Batch of arrays
        rows.packed_tokens(0, 256)    # int32 [256, 512], see megatron_ext.data.packed_tokens

    Pickles small: a worker process opens the files itself.

    Args:
        by_task: each row holds documents of one layout only, and so of one task unless they are interleaved. The rows
            of the layouts alternate in the order of the samples.
    """

    def __init__(self, mixture: Mixture, length: int, by_task: bool = False):
        self.mixture = mixture
        self.length = length
        layouts = np.array([int(source.layout) for source in mixture.sources])
        # Only documents of the same lane share rows.
        self._lane_of_source = np.unique(layouts, return_inverse=True)[1] if by_task else np.zeros_like(layouts)
        self._first_rows = [0]  # first row of chunk 0, 1, ... up to the first chunk that is not packed yet
        self._kept: dict[int, _Chunk] = {}
        # Samples over which the pieces of a long document are spread; a power of two, so that it divides a block.
        self._reach = np.array(
            [1 << (int(min(samples / 4, BLOCK)) | 1).bit_length() - 1 for samples in mixture.epoch_samples]
        )

    @classmethod
    def of(cls, mixture: Mixture, config: DataConfig) -> "PackedRows":
        """The rows of a run."""
        return cls(mixture, config.sequence_length, config.rows == "by_task")

    def __getstate__(self):
        return {**self.__dict__, "_kept": {}}

    def __getitem__(self, row: int) -> Batch:
        """Row ``row`` as a batch of one row, of tensors."""
        return self.batch(row, row + 1).tensors()

    def batch(self, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` as a batch of arrays."""
        special = self.mixture.special
        return unpack(self.packed_tokens(start, stop), special.pad, self.mixture.depth, special.image_offset)

    def packed_tokens(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, int32 [rows, length], longer if an image token has several codes (see
        :mod:`megatron_ext.data.packed_tokens`)."""
        return self.gather(np.arange(start, stop))

    def gather(self, numbers: np.ndarray) -> np.ndarray:
        """The rows with these numbers, int64 [rows], in this order, as :meth:`packed_tokens` gives them; ``NO_ROW`` is
        a row of padding."""
        buffer = TokenBuffer(len(numbers) * self.length, self.mixture.special.pad, self.mixture.depth)
        for places, chunk, rows in self._find(numbers):
            self._write(buffer, places * self.length, chunk, rows)
        padding = np.flatnonzero(numbers == NO_ROW) * self.length
        buffer.mark(padding, padding + self.length, packed_tokens.PADDING)
        return buffer.packed_tokens(len(numbers))

    def contents(self, start: int, stop: int) -> RowContents:
        """What rows ``start`` to ``stop`` hold, from the lengths of their documents: nothing is rendered."""
        parts = []
        for places, chunk, rows in self._find(np.arange(start, stop)):
            row_of, sample, first, last = self._items(chunk, rows)
            for source, own, document, dropped in self._by_source(chunk, sample):
                pieces = DocumentPieces(document, dropped, first[own], last[own], places[row_of[own]])
                parts.append(contents_of(source.dataset, pieces, source.layout, self.mixture.generation_text))
        return RowContents.joined(parts, stop - start)

    def documents(self, row: int) -> list[tuple[int, int, int]]:
        """(source, document, epoch) of each document or document piece in a row."""
        [(_, chunk, [i])] = self._find(np.array([row]))
        places = chunk.sample[chunk.ends[i] : chunk.ends[i + 1]]
        samples = chunk.samples
        return list(zip(*(field[places].tolist() for field in (samples.source, samples.document, samples.epoch))))

    def _write(self, buffer: TokenBuffer, row_place: np.ndarray, chunk: _Chunk, rows: np.ndarray) -> None:
        """Write rows of a chunk into a buffer, each to its ``row_place``."""
        row_of, sample, start, stop = self._items(chunk, rows)
        filled = np.cumsum(stop - start)  # tokens up to the end of each item, not counting padding
        row_filled = np.concatenate([[0], filled])[np.searchsorted(row_of, np.arange(len(rows) + 1))]
        places = filled - (stop - start) + (row_place - row_filled[:-1])[row_of]
        for source, own, document, dropped in self._by_source(chunk, sample):
            pieces = DocumentPieces(document, dropped, start[own], stop[own], places[own])
            render(buffer, source.dataset, pieces, source.layout, self.mixture.special, self.mixture.generation_text)
        buffer.mark(row_place + np.diff(row_filled), row_place + self.length, packed_tokens.PADDING)

    def _items(self, chunk: _Chunk, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """The items of rows of a chunk, row by row: the row of each (an index into ``rows``), its sample, and the range
        of its document, [items] each."""
        first, counts = chunk.ends[rows], chunk.ends[rows + 1] - chunk.ends[rows]
        row_of = np.repeat(np.arange(len(rows)), counts)
        item = np.arange(len(row_of)) + np.repeat(first - np.cumsum(counts) + counts, counts)
        sample, start = chunk.sample[item], chunk.piece[item] * (self.length - 1)
        return row_of, sample, start, np.minimum(start + self.length, chunk.samples.length[sample])

    def _by_source(self, chunk: _Chunk, sample: np.ndarray) -> Iterator[tuple[Source, np.ndarray, ...]]:
        """For each source of items: the source, the items [n] that are its own, their documents, whether they are
        dropped."""
        for number, own in by_source(chunk.samples.source[sample]):
            documents, dropped = chunk.samples.document[sample[own]], chunk.samples.dropped[sample[own]]
            reading.note(f"{self.mixture.sources[number].path}.bin")
            yield self.mixture.sources[number], own, documents, dropped

    def _find(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, _Chunk, np.ndarray]]:
        """For each chunk that holds some of the rows ``numbers``: the places of these in ``numbers``, the chunk, and
        their numbers in it."""
        while self._first_rows[-1] <= numbers.max(initial=NO_ROW):
            number = len(self._first_rows) - 1
            self._first_rows.append(self._first_rows[-1] + self._chunk(number).rows)
        chunk_of = np.searchsorted(self._first_rows, numbers, side="right") - 1
        for number in np.unique(chunk_of[numbers != NO_ROW]).tolist():
            places = np.flatnonzero(chunk_of == number)
            yield places, self._chunk(number), numbers[places] - self._first_rows[number]

    def _chunk(self, number: int) -> _Chunk:
        if number not in self._kept:
            while len(self._kept) > 1:  # reading moves forward: only the previous chunk may be needed again
                del self._kept[min(self._kept)]
            self._kept[number] = self._pack(number)
        return self._kept[number]

    def _pack(self, number: int) -> _Chunk:
        first, blocks = self._blocks_of(number)
        samples = self.mixture.samples(first * BLOCK, (first + blocks) * BLOCK)
        step = self.length - 1  # a piece shares one token with the next
        pieces = np.maximum(1, -(-(samples.length - 1) // step))
        last = (samples.length - (pieces - 1) * step).reshape(blocks, BLOCK)
        row_of, rows = _pack_lanes(last, self._lane_of_source[samples.source].reshape(blocks, BLOCK), self.length)
        # Only the last (usually the only) piece of each document was packed; the earlier pieces fill rows alone.
        sample = np.repeat(np.arange(len(pieces)), pieces - 1)
        piece = np.arange(len(sample)) - np.repeat(np.cumsum(pieces - 1) - (pieces - 1), pieces - 1)
        chance = counter_random.uniform(self.mixture.seed, _PIECES, first * BLOCK + sample, piece)
        reach = self._reach[samples.source[sample]]
        place = _spread(rows, (sample // reach + chance) * reach / BLOCK)

        row = place[np.concatenate([row_of, rows.sum() + np.arange(len(sample))])]
        by_row = np.argsort(row, kind="stable")
        return _Chunk(
            samples=samples,
            ends=np.searchsorted(row[by_row], np.arange(len(place) + 1)),
            sample=np.concatenate([np.arange(len(pieces)), sample])[by_row],
            piece=np.concatenate([pieces - 1, piece])[by_row],
        )

    def _blocks_of(self, chunk: int) -> tuple[int, int]:
        """First block and number of blocks of a chunk: 4, 4, 8, 16 ... blocks, so that the first rows come quickly."""
        pieces = max(1.0, self.mixture.mean_length / self.length)
        most = 1 << max(0, int(_MOST_PIECES / (BLOCK * pieces)).bit_length() - 1)
        least = min(4, most)
        growing = (most // least).bit_length()
        if chunk > growing:
            return (chunk - growing + 1) * most, most
        return (0, least) if chunk == 0 else (least << (chunk - 1), least << (chunk - 1))


def _pack_lanes(lengths: np.ndarray, lanes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents [blocks, BLOCK] into rows, each lane of each block separately.

    Returns:
        The row of each document, [blocks * BLOCK], counted over all lanes of all blocks, and the number of rows of each
        lane of each block, [blocks, lanes].
    """
    blocks, count = len(lengths), int(lanes.max()) + 1
    lane = (np.arange(blocks)[:, None] * count + lanes).reshape(-1)
    # Documents of each lane in order, from the left; zeros fill up.
    order, sizes = np.argsort(lane, kind="stable"), np.bincount(lane, minlength=blocks * count)
    column = np.arange(lane.size) - (sizes.cumsum() - sizes)[lane[order]]
    packed = np.zeros((blocks * count, int(sizes.max())), dtype=lengths.dtype)
    packed[lane[order], column] = lengths.reshape(-1)[order]
    row_of, rows = pack(packed, capacity)
    row = np.empty(lane.size, dtype=np.int64)
    row[order] = (row_of + (rows.cumsum() - rows)[:, None])[lane[order], column]
    return row, rows.reshape(blocks, count)


def _spread(packed: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """Order the rows of some blocks: packed rows keep the order of their lane, the lanes of a block are evenly
    interleaved, and rows of a single piece go to their target.

    Args:
        packed: number of packed rows of each lane of each block, int64 [blocks, lanes].
        alone: target of each row that a piece fills alone, in blocks, float64 [rows].

    Returns:
        The place of each row, int64: first the packed rows of all blocks, then the others.
    """
    rows = packed.reshape(-1)
    lane = np.repeat(np.arange(rows.size), rows)
    inside = np.arange(rows.sum()) - (np.cumsum(rows) - rows)[lane]
    block = lane // packed.shape[1]
    order = np.argsort(np.concatenate([block + (inside + 0.5) / rows[lane], alone]), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place
