"""A source: one data set in one layout, opened and checked."""

from dataclasses import dataclass

import numpy as np

from megatron_ext.config import SourceConfig
from megatron_ext.data.format import Dataset
from megatron_ext.data.rendering import lay_out
from megatron_ext.errors import UserError
from megatron_ext.token_classes import Layout

_CHUNK = 1 << 17  # documents checked at once


@dataclass
class Source:
    """One data set in one layout.

    Attributes:
        path: prefix of the data set.
        metadata: its metadata (:mod:`megatron_ext.data.format`).
        tokens: tokens of one epoch of the data set as this layout renders it, captions included.
        plain: documents with neither answers nor drawn images, of which an interleaved source learns all text.
        dataset: the open data set; None on a rank that does not read.
    """

    path: str
    layout: Layout
    weight: float
    metadata: dict
    tokens: int
    plain: int
    dataset: Dataset | None

    @classmethod
    def open(cls, name: str, config: SourceConfig, vocabulary_fingerprint: str, row_length: int) -> "Source":
        """Open and check a source; ``name`` is its key in the configuration, for messages.

        Raises:
            UserError: files are damaged, the token ids belong to another vocabulary, a document is useless for the
                layout, or a document with images is longer than a row.
        """
        name = f"{name} ({config.path})"
        if config.weight <= 0:
            raise UserError(f"{name}: weight {config.weight} must be positive")
        dataset = Dataset(config.path)
        fingerprint = dataset.metadata["vocabulary"]
        if fingerprint != vocabulary_fingerprint:
            raise UserError(
                f"{name}: was prepared with vocabulary {fingerprint}, this run has {vocabulary_fingerprint}; "
                "prepare it again or set data.vocabulary to the one it was made with"
            )
        layout = Layout[config.task.upper()]
        tokens, plain = 0, 0
        for start in range(0, len(dataset), _CHUNK):
            documents = np.arange(start, min(start + _CHUNK, len(dataset)))
            counts = _check_documents(name, dataset, documents, layout, row_length)
            tokens, plain = tokens + counts[0], plain + counts[1]
        return cls(config.path, layout, config.weight, dataset.metadata, tokens, plain, dataset)


def _check_documents(
    name: str, dataset: Dataset, documents: np.ndarray, layout: Layout, row_length: int
) -> tuple[int, int]:
    """Check documents, and count their rendered tokens and those of them that :attr:`Source.plain` counts."""
    places = lay_out(dataset, documents, np.zeros(len(documents), dtype=bool), layout)
    images, drawn, answers, plain = (
        np.bincount(places.owner, kind, len(documents))
        for kind in (places.image, places.drawn, places.answer, places.plain)
    )
    lengths = places.length
    useless, reason = {
        Layout.UNDERSTANDING: (answers == 0, "holds no answer or caption to learn"),
        Layout.GENERATION: (images == 0, "holds no image"),
        Layout.TEXT: (images > 0, "holds an image"),
        Layout.INTERLEAVED: (drawn + answers + plain == 0, "holds neither text nor a drawn image to learn"),
    }[layout]
    if useless.any():
        raise UserError(
            f"{name}: document {documents[useless.argmax()]} {reason}; not usable for task {layout.name.lower()}"
        )
    too_long = (images > 0) & (lengths > row_length)
    if too_long.any():
        worst = too_long.argmax()
        raise UserError(
            f"{name}: document {documents[worst]} is {lengths[worst]} tokens long and holds an image, so it cannot be "
            f"cut; raise data.sequence_length ({row_length})"
        )
    return int(lengths.sum()), int((plain > 0).sum())
