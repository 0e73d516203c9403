"""Packed tokens: each token of a row as one int32, the form in which rows travel from the packer to every rank.

::

    bit  31..29   28      27..26            25     24    23 ............ 0
         unused | start | task or padding | image | loss | token id

All fields of a :class:`~megatron_ext.data.batch.Batch` follow from these bits (:func:`unpack`): a label is the next
token of the same document, start bits count the documents, a position is the distance to the last start.

If an image token has D > 1 codes, the id is that of the first one, and the s numbers of a row are followed by D // 2
more for each of its tokens: the other codes, 16 bits each, the lower half first; zeros for text.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task

TOKEN_BITS = 24
TOKEN = (1 << TOKEN_BITS) - 1
LOSS = 1 << 24
"""The label of this token counts."""
IMAGE = 1 << 25
"""The token is a VQ code."""
TASK_SHIFT = 26
TASK = 0b11 << TASK_SHIFT
START = 1 << 28
"""The token is the first of its document."""
PADDING = 0b11 << TASK_SHIFT
"""In place of a task: the token is padding."""

MAX_VOCABULARY = 1 << TOKEN_BITS


def unpack(packed: np.ndarray, pad: int, depth: int = 1, image_offset: int = 0) -> Batch:
    """Unpack rows of packed tokens into a batch of arrays.

    Args:
        packed: int32 [b, (1 + D // 2) * s]; [b, s] with one code an image token.
        pad: id of the padding token, the label of tokens without a next token.
        depth: D, codes of an image token.
        image_offset: id of VQ code 0.
    """
    length = packed.shape[1] // (1 + depth // 2)
    packed, further_codes = packed[:, :length], packed[:, length:]
    tokens = (packed & TOKEN).astype(np.int64)
    padding = (packed & TASK) == PADDING
    start = (packed & START) != 0
    column = np.arange(length)
    first = np.maximum.accumulate(np.where(start, column, 0), axis=1)
    labels = np.full_like(tokens, pad)
    labels[:, :-1] = np.where(start[:, 1:] | padding[:, 1:], pad, tokens[:, 1:])
    values = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (packed & LOSS) != 0,
        "positions": np.where(padding, 0, column - first),
        "modality": np.where((packed & IMAGE) != 0, int(Modality.IMAGE), int(Modality.TEXT)),
        "task": np.where(padding, int(Task.TEXT), (packed & TASK) >> TASK_SHIFT),
        "document": np.where(padding, PADDING_DOCUMENT, start.cumsum(axis=1) - 1),
    }
    batch = Batch(**{name: value.astype(Batch.DTYPES[name]) for name, value in values.items()})
    if depth > 1:
        batch.codes = np.empty((*tokens.shape, depth), dtype=np.int32)
        batch.codes[..., 0] = np.where(batch.modality == Modality.IMAGE, tokens - image_offset, 0)
        batch.codes[..., 1:] = _halves(further_codes).reshape(*tokens.shape, -1)[..., : depth - 1]
    return batch


def _halves(numbers: np.ndarray) -> np.ndarray:
    """The halves of numbers, int32 [..., n], as uint16 [..., 2n]."""
    return np.ascontiguousarray(numbers, dtype="<i4").view("<u2")


@dataclass(frozen=True)
class Unpack:
    """What makes a step of its rows by default: their batch. Here, because worker processes must not import torch."""

    pad: int
    depth: int = 1
    image_offset: int = 0

    def __call__(self, packed_tokens: np.ndarray, step: int) -> Batch:
        return unpack(packed_tokens, self.pad, self.depth, self.image_offset)
