"""Words to a batch, on whatever device they are."""

import torch

from megatron_ext.data import words
from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task


def decode(packed: torch.Tensor, pad: int) -> Batch:
    """Decode rows of words.

    Args:
        packed: int32 [b, s], see :mod:`megatron_ext.data.words`.
        pad: id of the padding token, the label where there is none.
    """
    tokens = (packed & words.TOKEN).long()
    padding = (packed & words.TASK) == words.PADDING
    start = (packed & words.START) != 0
    place = torch.arange(packed.shape[1], device=packed.device).expand_as(tokens)
    first = torch.where(start, place, 0).cummax(dim=1).values
    labels = torch.full_like(tokens, pad)
    labels[:, :-1] = torch.where(start[:, 1:] | padding[:, 1:], pad, tokens[:, 1:])
    values = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (packed & words.LOSS) != 0,
        "positions": torch.where(padding, 0, place - first),
        "modality": torch.where((packed & words.IMAGE) != 0, int(Modality.IMAGE), int(Modality.TEXT)),
        "task": torch.where(padding, int(Task.TEXT), (packed & words.TASK) >> words.TASK_SHIFT),
        "document": torch.where(padding, PADDING_DOCUMENT, start.cumsum(dim=1) - 1),
    }
    return Batch(**{name: value.to(Batch.DTYPES[name]) for name, value in values.items()})
