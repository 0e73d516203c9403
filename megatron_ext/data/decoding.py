"""Words to a batch."""

import numpy as np

from megatron_ext.data import packed_tokens
from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task


def decode(packed: np.ndarray, pad: int) -> Batch:
    """Decode rows of packed tokens into a batch of arrays.

    Args:
        packed: int32 [b, s], see :mod:`megatron_ext.data.packed_tokens`.
        pad: id of the padding token, the label where there is none.
    """
    tokens = (packed & packed_tokens.TOKEN).astype(np.int64)
    padding = (packed & packed_tokens.TASK) == packed_tokens.PADDING
    start = (packed & packed_tokens.START) != 0
    column = np.arange(packed.shape[1])
    first = np.maximum.accumulate(np.where(start, column, 0), axis=1)
    labels = np.full_like(tokens, pad)
    labels[:, :-1] = np.where(start[:, 1:] | padding[:, 1:], pad, tokens[:, 1:])
    values = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (packed & packed_tokens.LOSS) != 0,
        "positions": np.where(padding, 0, column - first),
        "modality": np.where((packed & packed_tokens.IMAGE) != 0, int(Modality.IMAGE), int(Modality.TEXT)),
        "task": np.where(padding, int(Task.TEXT), (packed & packed_tokens.TASK) >> packed_tokens.TASK_SHIFT),
        "document": np.where(padding, PADDING_DOCUMENT, start.cumsum(axis=1) - 1),
    }
    return Batch(**{name: value.astype(Batch.DTYPES[name]) for name, value in values.items()})
