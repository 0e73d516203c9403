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

import hashlib
import json
import mmap
import os
import struct
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext.data import reading
from megatron_ext.data.vq_metadata import check_codebook, codes_of_image, depth_of, grid_text
from megatron_ext.errors import UserError
from megatron_ext.files import write_json

TEXT, IMAGE, ANSWER, DRAWN = 0, 1, 2, 3
"""Modes of a sequence."""

FORMAT, FORMAT_WITH_DRAWN, FORMAT_WITH_DEPTH = 1, 2, 3
"""Version of the metadata, that of a data set with a ``DRAWN`` image, and that of one with several codes a token."""

FULL_CHECK_LIMIT = 256 << 20
"""Opening hashes a .bin of at most this many bytes; a larger one only has its size checked (``verify=True`` hashes)."""

MOST_MAPPED = 1024
"""Data sets whose files are mapped at a time; the kernel allows about 65,000 maps."""

_COUNTS = ("documents", "sequences", "tokens", "image_tokens", "images")
_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, documents + 1
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INT32_CODE = 4
_MAPPED = ("sequence_lengths", "sequence_modes", "sequence_pointers", "document_ends", "tokens")
_mapped: "deque[Dataset]" = deque()


def is_image(modes):
    """Whether a mode, or each of an array of modes, is that of an image."""
    return (modes == IMAGE) | (modes == DRAWN)


class DatasetWriter:
    """Writes a data set; use it as a context manager.

    A clean exit finishes the data set and only then replaces one that was at ``prefix`` before; an exception removes
    everything that was written. ::

        with DatasetWriter("data/captions", vocabulary.fingerprint, vq, {"images": "photos/*.tar"}) as writer:
            writer.add([(IMAGE, vocabulary.image_ids(codes)), (ANSWER, vocabulary.encode_segment(caption))])

    Args:
        prefix: path without extension; its folder is created.
        vocabulary_fingerprint: ``Vocabulary.fingerprint`` of the token ids.
        vq: ``{"fingerprint": str, "grid": [h, w], "codebook_size": int}``, and ``"depth": int`` if an image token has
            several codes; None for a data set without images.
        source: free-form, JSON-serialisable description of where the data came from.

    Raises:
        UserError: the codebook is too large for several codes a token.
    """

    def __init__(self, prefix: str | Path, vocabulary_fingerprint: str, vq: dict | None, source: dict):
        check_codebook(vq, prefix)
        self.prefix = Path(prefix)
        self.metadata = {
            "format": FORMAT if depth_of(vq) == 1 else FORMAT_WITH_DEPTH,
            **dict.fromkeys(_COUNTS, 0),
            "vocabulary": vocabulary_fingerprint,
            "vq": vq,
            "source": source,
        }
        self._temporary = {
            kind: self.prefix.with_name(f".{self.prefix.name}.{os.getpid()}.tmp.{kind}") for kind in ("bin", "idx")
        }

    def __enter__(self) -> "DatasetWriter":
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._builder = IndexedDatasetBuilder(str(self._temporary["bin"]), dtype=np.int32, multimodal=True)
        return self

    def add(self, document: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Append one document: (mode, token ids) per sequence.

        Raises:
            ValueError: there is no sequence, a sequence is empty or of an unknown mode, or an image is not one VQ grid.
        """
        if not document:
            raise ValueError("a document needs at least one sequence")
        modes = [int(mode) for mode, _ in document]
        sequences = [np.asarray(ids, dtype=np.int32) for _, ids in document]
        for mode, ids in zip(modes, sequences):
            self._check(mode, ids)
        self._builder.add_document(np.concatenate(sequences), [len(ids) for ids in sequences], modes)
        images = [ids for mode, ids in zip(modes, sequences) if is_image(mode)]
        codes = sum(map(len, images))
        image_tokens = codes // depth_of(self.metadata["vq"])
        tokens = sum(map(len, sequences)) - codes + image_tokens
        counts = (1, len(sequences), tokens, image_tokens, len(images))
        for key, count in zip(_COUNTS, counts):
            self.metadata[key] += count
        if DRAWN in modes:
            self.metadata["format"] = max(self.metadata["format"], FORMAT_WITH_DRAWN)

    def _check(self, mode: int, ids: np.ndarray) -> None:
        if mode not in (TEXT, IMAGE, ANSWER, DRAWN):
            raise ValueError(f"sequence mode {mode} is none of TEXT, IMAGE, ANSWER, DRAWN")
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"a sequence must be a non-empty list of token ids, got shape {ids.shape}")
        if ids.min() < 0:
            raise ValueError(f"token id {ids.min()} is negative")
        if is_image(mode):
            if self.metadata["vq"] is None:
                raise ValueError("an image in a data set that was opened without a VQ model")
            if len(ids) != codes_of_image(self.metadata["vq"]):
                raise ValueError(f"an image of {len(ids)} codes, but {grid_text(self.metadata['vq'])}")

    def add_dataset(self, prefix: str | Path) -> None:
        """Append every document of a finished data set with the same vocabulary and VQ model.

        Raises:
            UserError: the vocabulary or the VQ model differs, or the data set is not finished.
        """
        metadata = _read_metadata(prefix)
        for key in ("vocabulary", "vq"):
            if metadata[key] != self.metadata[key]:
                raise UserError(
                    f"{prefix}.json: '{key}' is {metadata[key]}, cannot be merged with {self.metadata[key]}"
                )
        self._builder.add_index(str(prefix))
        for key in _COUNTS:
            self.metadata[key] += metadata[key]
        self.metadata["format"] = max(self.metadata["format"], metadata["format"])

    def __exit__(self, exception_type, exception, traceback) -> None:
        try:
            self._builder.finalize(str(self._temporary["idx"]))
            if exception_type is None:
                self._publish()
        finally:
            for file in self._temporary.values():
                file.unlink(missing_ok=True)

    def _publish(self) -> None:
        if not self.metadata["documents"]:
            raise UserError(f"{self.prefix}: no document was written; nothing to keep")
        self.metadata["files"] = {kind: _describe(file) for kind, file in self._temporary.items()}
        metadata_file = _file(self.prefix, "json")
        metadata_file.unlink(missing_ok=True)  # until the new metadata is there, the data set is incomplete
        for kind, file in self._temporary.items():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(file, _file(self.prefix, kind))
        write_json(metadata_file, self.metadata)


class Dataset:
    """A finished data set, read through memory maps; pickles as its prefix, so worker processes open it themselves.

    Files are mapped when they are first read, and no more than those of :data:`MOST_MAPPED` data sets at a time.

    Attributes:
        prefix: path without extension.
        metadata: see the module.
        tokens: every stored id, int32, a memory map.
        sequence_lengths: stored ids of each sequence, int32 [sequences].
        sequence_modes: int8 [sequences].
        sequence_pointers: int64 [sequences], byte at which each sequence starts in the .bin.
        document_ends: int64 [documents + 1]; document i consists of the sequences ``document_ends[i]`` to
            ``document_ends[i + 1]``.
    """

    def __init__(self, prefix: str | Path, verify: bool = False):
        """Open the data set at ``prefix`` and check its files against the metadata.

        The sizes and the hash of the .idx are always checked; the hash of the .bin only if it is small
        (``FULL_CHECK_LIMIT``) or with ``verify``.

        Raises:
            UserError: a file is missing, truncated, altered, or of another version.
        """
        self.prefix = Path(prefix)
        self.metadata = _read_metadata(prefix)
        hashed = verify or self.metadata["files"]["bin"]["bytes"] <= FULL_CHECK_LIMIT
        for kind in ("bin", "idx"):
            _check_file(_file(prefix, kind), self.metadata["files"][kind], hashed or kind == "idx")
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
        reading.note(_file(self.prefix, "idx"))
        index = _map_file(_file(self.prefix, "idx"), np.uint8)
        magic, version, code, sequences, ends = _INDEX_HEADER.unpack(bytes(index[: _INDEX_HEADER.size]))
        if (magic, version, code) != (_INDEX_MAGIC, 1, _INT32_CODE):
            raise UserError(f"{_file(self.prefix, 'idx')}: not an int32 Megatron-Core index of version 1")
        offset = _INDEX_HEADER.size

        def take(dtype, count):
            nonlocal offset
            start, offset = offset, offset + count * np.dtype(dtype).itemsize
            return index[start:offset].view(dtype)

        self.sequence_lengths = take(np.int32, sequences)
        self.sequence_pointers = take(np.int64, sequences)
        self.document_ends = take(np.int64, ends)
        self.sequence_modes = take(np.int8, sequences)
        reading.note(_file(self.prefix, "bin"))
        self.tokens = _map_file(_file(self.prefix, "bin"), np.int32)
        reading.note(None)

    def __getstate__(self):
        return {"prefix": self.prefix, "metadata": self.metadata}

    def __setstate__(self, state):
        self.__dict__.update(state)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.document_ends) - 1

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
        starts = (self.sequence_pointers[first:stop] // self.tokens.itemsize).tolist()
        lengths = self.sequence_lengths[first:stop].tolist()
        modes = self.sequence_modes[first:stop].tolist()
        tokens = self.tokens
        return [(mode, tokens[start : start + n]) for mode, start, n in zip(modes, starts, lengths)]


def verify(prefix: str | Path) -> dict:
    """Check every byte of a data set's files against its metadata, and the metadata's counts against the index.

    Returns:
        The metadata.

    Raises:
        UserError: names the file that is missing, truncated or altered.
    """
    dataset = Dataset(prefix, verify=True)
    image, lengths = is_image(dataset.sequence_modes), dataset.token_counts(slice(None))
    counts = (
        len(dataset),
        len(lengths),
        int(lengths.sum(dtype=np.int64)),
        int(lengths[image].sum(dtype=np.int64)),
        int(image.sum()),
    )
    for key, count in zip(_COUNTS, counts):
        if dataset.metadata[key] != count:
            raise UserError(f"{_file(prefix, 'json')}: '{key}' is {dataset.metadata[key]}, the index holds {count}")
    expected = FORMAT_WITH_DRAWN if (dataset.sequence_modes == DRAWN).any() else FORMAT
    expected = expected if dataset.depth == 1 else FORMAT_WITH_DEPTH
    if dataset.metadata["format"] != expected:
        raise UserError(f"{_file(prefix, 'json')}: 'format' is {dataset.metadata['format']}, the index has {expected}")
    return dataset.metadata


def merge(prefixes: Sequence[str | Path], out_prefix: str | Path) -> dict:
    """Join finished data sets (the shards of one preparation) into one, in the given order.

    Returns:
        The metadata of the result.

    Raises:
        UserError: a shard is damaged, or was made with another vocabulary or VQ model.
    """
    if not prefixes:
        raise UserError(f"{out_prefix}: no data set to merge")
    shards = [verify(prefix) for prefix in prefixes]
    source = {"merged": [{"prefix": str(p), "source": shard["source"]} for p, shard in zip(prefixes, shards)]}
    with DatasetWriter(out_prefix, shards[0]["vocabulary"], shards[0]["vq"], source) as writer:
        for prefix in prefixes:
            writer.add_dataset(prefix)
    return writer.metadata


def _map_file(file: Path, dtype: type) -> np.ndarray:
    """A file as a read-only array; ``np.memmap`` takes three times as long."""
    with open(file, "rb") as stream:
        return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def _file(prefix: str | Path, kind: str) -> Path:
    return Path(f"{prefix}.{kind}")


def _read_metadata(prefix: str | Path) -> dict:
    file = _file(prefix, "json")
    try:
        metadata = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: not found; there is no finished data set at this prefix") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as the metadata of a data set ({error})") from None
    required = {*_COUNTS, "vocabulary", "vq", "files", "source"}
    formats = (FORMAT, FORMAT_WITH_DRAWN, FORMAT_WITH_DEPTH)
    if not isinstance(metadata, dict) or metadata.get("format") not in formats or required - metadata.keys():
        raise UserError(f"{file}: not the metadata of a data set of format 1, 2 or 3; prepare the data set again")
    return metadata


def _describe(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _check_file(file: Path, expected: dict, hashed: bool) -> None:
    if not file.is_file():
        raise UserError(f"{file}: not found, but its metadata is there; prepare the data set again")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise UserError(f"{file}: {size} bytes, the metadata says {expected['bytes']}; truncated or replaced")
    if hashed and _sha256(file) != expected["sha256"]:
        raise UserError(f"{file}: sha256 differs from the metadata's; the file was altered")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
