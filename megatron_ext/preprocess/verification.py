"""Verifying a finished data set: its files, its fingerprints and every token."""

from pathlib import Path

import numpy as np

from megatron_ext.data import format as data_format
from megatron_ext.data.format import Dataset, is_image
from megatron_ext.data.vq_metadata import codes_of_image, grid_text
from megatron_ext.errors import UserError
from megatron_ext.vocabulary import Vocabulary

BLOCK = 1 << 18
"""Sequences checked at once."""


def verify_data_set(prefix: str | Path, vocabulary: Vocabulary | None = None, vq_metadata: dict | None = None) -> dict:
    """Check hashes, sizes and fingerprints, that every image is one VQ grid, that text sequences hold only text tokens
    and that images hold only codes.

    Args:
        vocabulary: also check that the data set was made with this vocabulary.
        vq_metadata: also check that its images were encoded by this VQ tokenizer (``VQModel.metadata``).

    Returns:
        The metadata.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    metadata = data_format.verify(prefix)
    file = f"{prefix}.json"
    if vocabulary is not None and metadata["vocabulary"] != vocabulary.fingerprint:
        raise UserError(
            f"{file}: of vocabulary {metadata['vocabulary']}, but {vocabulary.folder} is {vocabulary.fingerprint}"
        )
    if vq_metadata is not None and metadata["vq"] is not None and metadata["vq"] != vq_metadata:
        raise UserError(f"{file}: encoded by the VQ tokenizer {metadata['vq']}, not by {vq_metadata}")
    dataset = Dataset(prefix)
    _check_grid(prefix, dataset)
    text, image = (
        _extremes(dataset, ~is_image(dataset.sequence_modes)),
        _extremes(dataset, is_image(dataset.sequence_modes)),
    )
    if vocabulary is not None:
        _check_range(prefix, "a text sequence", text, 0, vocabulary.text_size)
        _check_range(prefix, "an image", image, vocabulary.image_offset, vocabulary.size)
    elif image is not None:
        _check_range(prefix, "an image", image, image[0], image[0] + metadata["vq"]["codebook_size"])
        _check_range(prefix, "a text sequence", text, 0, image[0])
    return metadata


def _check_grid(prefix: str | Path, dataset: Dataset) -> None:
    lengths = dataset.sequence_lengths[is_image(dataset.sequence_modes)]
    if not len(lengths):
        return
    if dataset.metadata["vq"] is None:
        raise UserError(f"{prefix}.json: names no VQ tokenizer, but the data set holds images")
    vq = dataset.metadata["vq"]
    if len(wrong := lengths[lengths != codes_of_image(vq)]):
        raise UserError(f"{prefix}.idx: an image of {wrong[0]} codes, but {grid_text(vq)}")


def _extremes(dataset: Dataset, selected: np.ndarray) -> tuple[int, int] | None:
    """Smallest and largest token id of the selected sequences (bool [sequences]); None if there are none."""
    smallest, largest = [], []
    starts = dataset.sequence_pointers // dataset.tokens.itemsize
    for first in range(0, len(starts), BLOCK):
        block = slice(first, first + BLOCK)
        stop = starts[block][-1] + dataset.sequence_lengths[block][-1]
        tokens, borders = dataset.tokens[starts[first] : stop], starts[block] - starts[first]
        smallest += np.minimum.reduceat(tokens, borders)[selected[block]].tolist()
        largest += np.maximum.reduceat(tokens, borders)[selected[block]].tolist()
    return (min(smallest), max(largest)) if smallest else None


def _check_range(prefix: str | Path, kind: str, extremes: tuple[int, int] | None, first: int, stop: int) -> None:
    for token in extremes or ():
        if not first <= token < stop:
            raise UserError(f"{prefix}.bin: token {token} in {kind}, whose tokens are {first} to {stop - 1}")
