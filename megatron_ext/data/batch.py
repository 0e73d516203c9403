"""One batch of packed rows: the only thing that the data path hands to the model."""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor


@dataclass
class Batch:
    """Packed rows of documents; every field is [b, s], b rows of s tokens.

    Attributes:
        tokens: token ids, int64.
        labels: the id that each token should predict, int64 (the next token of the same document; ``pad`` where
            there is none).
        loss_mask: 1.0 where the label counts, float32.
        positions: position inside the document (rotary position), int64; 0 for padding.
        modality: :class:`~megatron_ext.token_classes.Modality`, int8.
        task: :class:`~megatron_ext.token_classes.Task` of the document, int8.
        document: number of the document inside its row, 0, 1, ..., int32; ``PADDING_DOCUMENT`` for the padding,
            which stands at the end of a row. A document's tokens are contiguous.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    modality: Tensor
    task: Tensor
    document: Tensor

    DTYPES: ClassVar[dict] = {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "positions": torch.int64,
        "modality": torch.int8,
        "task": torch.int8,
        "document": torch.int32,
    }

    @classmethod
    def names(cls) -> list[str]:
        """Field names in order."""
        return [f.name for f in fields(cls)]

    def rows(self, start: int, stop: int) -> "Batch":
        """Rows ``start`` to ``stop`` as a batch (views)."""
        return Batch(*(getattr(self, name)[start:stop] for name in self.names()))

    def to(self, device, non_blocking: bool = False) -> "Batch":
        """The same batch on ``device``."""
        return Batch(*(getattr(self, name).to(device, non_blocking=non_blocking) for name in self.names()))

    @property
    def shape(self) -> tuple[int, int]:
        """(b, s)."""
        return tuple(self.tokens.shape)
