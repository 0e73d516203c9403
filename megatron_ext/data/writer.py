"""Writing a data set, document by document."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext.data import object_store
from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT, format_of, is_image
from megatron_ext.data.metadata import COUNTS, describe, file_of
from megatron_ext.data.vq_metadata import check_codebook, codes_of_image, depth_of, grid_text
from megatron_ext.errors import UserError
from megatron_ext.files import write_json


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
            "format": format_of(vq, drawn=False),
            **dict.fromkeys(COUNTS, 0),
            "vocabulary": vocabulary_fingerprint,
            "vq": vq,
            "source": source,
        }
        self._temporary = temporary_files(prefix)

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
        for key, count in zip(COUNTS, counts):
            self.metadata[key] += count
        if DRAWN in modes:
            self.metadata["format"] = format_of(self.metadata["vq"], drawn=True)

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

    def __exit__(self, exception_type, exception, traceback) -> None:
        try:
            self._builder.finalize(str(self._temporary["idx"]))
            if exception_type is None:
                publish(self.prefix, self._temporary, self.metadata)
        finally:
            for file in self._temporary.values():
                file.unlink(missing_ok=True)


def temporary_files(prefix: str | Path) -> dict[str, Path]:
    """Where the files of a data set are written until they are complete, by kind.

    Raises:
        UserError: the data set would be in an object store.
    """
    if object_store.is_remote(prefix):
        raise UserError(f"{prefix}: data sets are written to disk; copy the three files there afterwards")
    prefix = Path(prefix)
    return {kind: prefix.with_name(f".{prefix.name}.{os.getpid()}.tmp.{kind}") for kind in ("bin", "idx")}


def publish(prefix: Path, temporary: dict[str, Path], metadata: dict) -> None:
    """Move complete files to their places and write the metadata, which makes them a data set. Where the metadata does
    not describe the files yet, they are hashed.

    Raises:
        UserError: there is no document.
    """
    if not metadata["documents"]:
        raise UserError(f"{prefix}: no document was written; nothing to keep")
    if "files" not in metadata:
        metadata["files"] = {kind: describe(file) for kind, file in temporary.items()}
    metadata_file = file_of(prefix, "json")
    metadata_file.unlink(missing_ok=True)  # until the new metadata is there, the data set is incomplete
    for kind, file in temporary.items():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(file, file_of(prefix, kind))
    write_json(metadata_file, metadata)
