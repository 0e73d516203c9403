"""The on-disk data set: Megatron-Core's indexed data set with metadata beside it.

::

    PREFIX.bin    token ids, int32, one sequence after another          } Megatron-Core's own files
    PREFIX.idx    length and mode of each sequence, ends of documents   } (``multimodal=True``)
    PREFIX.json   the metadata: counts, fingerprints of vocabulary and VQ model, size and sha256 of the two files

A document is several sequences, each with a mode. ``TEXT`` is context (a question, plain text). ``IMAGE`` is the VQ
codes of one image as unified token ids (row-major, without ``<boi>`` and ``<eoi>``). ``ANSWER`` is text to be learnt in
understanding (an answer, a caption). ``DRAWN`` is an image to be learnt in interleaved documents, where an ``IMAGE`` is
given. Text has no ``bos`` and no ``<eod>``; rendering adds them (:mod:`megatron_ext.data.rendering`).

An image token may have D codes of a residual quantizer: an image then is P * D ids, the D of a token side by side. The
metadata says so (``vq.depth``) and counts tokens, not codes, so that a length is always one in a row.

The metadata is written last, so a prefix without metadata is an unfinished data set. Megatron-Core writes the files,
but ``numpy`` alone reads them: importing Megatron-Core takes seconds, and the processes that pack rows should start
faster.
"""

import mmap
import struct
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_ext.data import object_store, reading
from megatron_ext.data.metadata import (
    COUNTS,
    FORMAT,
    FORMAT_WITH_DEPTH,
    FORMAT_WITH_DRAWN,
    check_file,
    file_of,
    index_file,
    read_metadata,
)
from megatron_ext.data.vq_metadata import depth_of
from megatron_ext.errors import UserError

TEXT, IMAGE, ANSWER, DRAWN = 0, 1, 2, 3
"""Modes of a sequence."""

FULL_CHECK_LIMIT = 256 << 20
"""Opening hashes a .bin of at most this many bytes; a larger one only has its size checked (``verify=True`` hashes)."""

MOST_MAPPED = 1024
"""Data sets whose files are mapped at a time; the kernel allows about 65,000 maps."""

INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, documents + 1
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INT32_CODE = 4
_MAPPED = ("sequence_lengths", "sequence_modes", "sequence_pointers", "document_ends", "tokens")
_mapped: "deque[Dataset]" = deque()


def is_image(modes):
    """Whether a mode, or each of an array of modes, is that of an image."""
    return (modes == IMAGE) | (modes == DRAWN)


class Dataset:
    """A finished data set, read through memory maps; pickles as its prefix, so worker processes open it themselves.

    Files are mapped when they are first read, and no more than those of :data:`MOST_MAPPED` data sets at a time. Of a
    data set in an object store (``s3://...``, ``msc://...``) the .idx is copied to a local cache, and ranges of the
    .bin are fetched when they are read.

    Attributes:
        prefix: path or address, without extension.
        metadata: see the module.
        tokens: every stored id, int32: a memory map, or an object of which slices are fetched.
        sequence_lengths: stored ids of each sequence, int32 [sequences].
        sequence_modes: int8 [sequences].
        sequence_pointers: int64 [sequences], byte at which each sequence starts in the .bin.
        document_ends: int64 [documents + 1]; document i consists of the sequences ``document_ends[i]`` to
            ``document_ends[i + 1]``.
    """

    def __init__(self, prefix: str | Path, verify: bool = False):
        """Open the data set at ``prefix`` and check its files against the metadata.

        The sizes and the hash of the .idx are always checked; the hash of the .bin only if it is a small file
        (``FULL_CHECK_LIMIT``) or with ``verify``.

        Raises:
            UserError: a file is missing, truncated, altered, or of another version.
        """
        self.prefix = str(prefix)
        self.metadata = read_metadata(prefix)
        files = self.metadata["files"]
        small = files["bin"]["bytes"] <= FULL_CHECK_LIMIT and not self.is_remote
        check_file(f"{prefix}.bin", files["bin"], hashed=verify or small)
        self._index_file = index_file(prefix, files["idx"])
        if len(self) != self.metadata["documents"]:
            raise UserError(f"{prefix}.json: 'documents' is {self.metadata['documents']}, the index holds {len(self)}")

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in _MAPPED:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self._map()
        return self.__dict__[name]

    def _map(self) -> None:
        if len(_mapped) >= MOST_MAPPED:
            earlier = _mapped.popleft()
            for name in _MAPPED:
                earlier.__dict__.pop(name, None)
        _mapped.append(self)
        reading.note(self._index_file)
        index = _map_file(self._index_file, np.uint8)
        magic, version, code, sequences, ends = INDEX_HEADER.unpack(bytes(index[: INDEX_HEADER.size]))
        if (magic, version, code) != (INDEX_MAGIC, 1, INT32_CODE):
            raise UserError(f"{self._index_file}: not an int32 Megatron-Core index of version 1")
        offset = INDEX_HEADER.size

        def take(dtype, count):
            nonlocal offset
            start, offset = offset, offset + count * np.dtype(dtype).itemsize
            return index[start:offset].view(dtype)

        self.sequence_lengths = take(np.int32, sequences)
        self.sequence_pointers = take(np.int64, sequences)
        self.document_ends = take(np.int64, ends)
        self.sequence_modes = take(np.int8, sequences)
        if self.is_remote:
            self.tokens = object_store.RemoteArray(f"{self.prefix}.bin", np.int32)
        else:
            reading.note(file_of(self.prefix, "bin"))
            self.tokens = _map_file(file_of(self.prefix, "bin"), np.int32)
        reading.note(None)

    def __getstate__(self):
        return {"prefix": self.prefix, "metadata": self.metadata, "_index_file": self._index_file}

    def __setstate__(self, state):
        self.__dict__.update(state)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.document_ends) - 1

    @property
    def is_remote(self) -> bool:
        """Whether it is in an object store."""
        return object_store.is_remote(self.prefix)

    @property
    def depth(self) -> int:
        """Codes of an image token."""
        return depth_of(self.metadata["vq"])

    @property
    def document_lengths(self) -> np.ndarray:
        """Stored tokens of each document, int64 [documents]."""
        return np.add.reduceat(self.token_counts(slice(None)), self.document_ends[:-1], dtype=np.int64)

    def token_counts(self, sequences) -> np.ndarray:
        """Tokens of sequences (numbers or a slice), integers [sequences]: ids of text, positions of images."""
        lengths = self.sequence_lengths[sequences]
        if self.depth == 1:
            return lengths
        return np.where(is_image(self.sequence_modes[sequences]), lengths // self.depth, lengths)

    def document(self, i: int) -> list[tuple[int, np.ndarray]]:
        """(mode, token ids int32) of each sequence of document ``i``; read-only views of the file."""
        first, stop = self.document_ends[i], self.document_ends[i + 1]
        modes = self.sequence_modes[first:stop].tolist()
        starts = self.sequence_pointers[first:stop] // self.tokens.itemsize
        return list(zip(modes, self.ranges(starts, starts + self.sequence_lengths[first:stop])))

    def check_counts(self) -> None:
        """Raise a UserError unless the index holds what the metadata counts."""
        image, lengths = is_image(self.sequence_modes), self.token_counts(slice(None))
        counts = (
            len(self),
            len(lengths),
            int(lengths.sum(dtype=np.int64)),
            int(lengths[image].sum(dtype=np.int64)),
            int(image.sum()),
        )
        for key, count in zip(COUNTS, counts):
            if self.metadata[key] != count:
                raise UserError(f"{self.prefix}.json: '{key}' is {self.metadata[key]}, the index holds {count}")
        expected = format_of(self.metadata["vq"], (self.sequence_modes == DRAWN).any())
        if self.metadata["format"] != expected:
            raise UserError(f"{self.prefix}.json: 'format' is {self.metadata['format']}, the index has {expected}")

    def ranges(self, starts: np.ndarray, stops: np.ndarray) -> Iterable[np.ndarray]:
        """The stored ids from ``starts`` to ``stops``, int64 [ranges] each: read-only int32 arrays. Those in an object
        store are fetched together."""
        if self.is_remote:
            return self.tokens.ranges(starts, stops)
        tokens = self.tokens
        return (tokens[start:stop] for start, stop in zip(starts.tolist(), stops.tolist()))


def verify(prefix: str | Path) -> dict:
    """Check every byte of a data set's files against its metadata, and the metadata's counts against the index.

    Returns:
        The metadata.

    Raises:
        UserError: names the file that is missing, truncated or altered.
    """
    dataset = Dataset(prefix, verify=True)
    dataset.check_counts()
    return dataset.metadata


def format_of(vq: dict | None, drawn: bool) -> int:
    """Version of the metadata of a data set with this tokenizer, with images that are ``drawn`` or without."""
    return FORMAT_WITH_DEPTH if depth_of(vq) > 1 else FORMAT_WITH_DRAWN if drawn else FORMAT


def _map_file(file: Path, dtype: type) -> np.ndarray:
    """A file as a read-only array; ``np.memmap`` takes three times as long."""
    with open(file, "rb") as stream:
        return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), dtype)
