"""One batch of packed rows: the interface between the data and the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from megatron_ext.token_classes import Modality, Task

if TYPE_CHECKING:  # worker processes, which make batches of arrays, do not wait for torch
    from torch import Tensor


@dataclass
class Batch:
    """Packed rows of documents: b rows of s tokens, [b, s] unless said otherwise; tensors, or NumPy arrays on the host.

    Attributes:
        tokens: token ids, int64.
        labels: the id that each token should predict, int64 (the next token of the same document; ``pad`` for the last
            token of a document).
        loss_mask: 1.0 where the label counts, float32.
        positions: position in the document (for the rotary embedding), int64; 0 for padding.
        modality: :class:`~megatron_ext.token_classes.Modality`, int8.
        task: :class:`~megatron_ext.token_classes.Task` of the document, int8.
        document: number of the document in its row, 0, 1, ..., int32; ``PADDING_DOCUMENT`` for the padding at the end
            of the row. A document's tokens are contiguous.
        codes: the D VQ codes of each image token, [b, s, D], int32; 0 for text. None with one code a token, which is
            its id. With several, ``tokens`` and ``labels`` hold the id of the first one.
    """

    tokens: Tensor | np.ndarray
    labels: Tensor | np.ndarray
    loss_mask: Tensor | np.ndarray
    positions: Tensor | np.ndarray
    modality: Tensor | np.ndarray
    task: Tensor | np.ndarray
    document: Tensor | np.ndarray
    codes: Tensor | np.ndarray | None = None

    DTYPES: ClassVar[dict[str, str]] = {
        "tokens": "int64",
        "labels": "int64",
        "loss_mask": "float32",
        "positions": "int64",
        "modality": "int8",
        "task": "int8",
        "document": "int32",
    }

    @classmethod
    def zeros(cls, rows: int, length: int) -> Batch:
        """Zero tensors [rows, length]: each row is one document of understanding text."""
        import torch

        return cls(**{name: torch.zeros(rows, length, dtype=getattr(torch, t)) for name, t in cls.DTYPES.items()})

    @classmethod
    def names(cls) -> list[str]:
        """Names of the fields that every batch has, in order."""
        return [f.name for f in fields(cls) if f.name != "codes"]

    def map(self, change: Callable) -> Batch:
        """The batch of ``change(field)`` for each field that there is."""
        return Batch(*(None if (value := getattr(self, f.name)) is None else change(value) for f in fields(self)))

    def rows(self, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` as a batch (views)."""
        return self.map(lambda field: field[start:stop])

    def to(self, device) -> Batch:
        """The batch with its tensors on ``device``."""
        return self.map(lambda field: field.to(device))

    def arrays(self) -> Batch:
        """The batch as NumPy arrays; host tensors share their memory."""
        return self.map(np.asarray)

    def tensors(self) -> Batch:
        """The batch as host tensors, which share the arrays' memory."""
        import torch

        return self.map(torch.as_tensor)

    def document_starts(self) -> np.ndarray:
        """The first token of each document of a batch on the host, bool [b, s]; padding counts as a document."""
        document = np.asarray(self.document)
        starts = np.ones(document.shape, dtype=bool)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        return starts

    def predicted_task(self) -> np.ndarray:
        """The task that the loss of each token of a batch on the host counts to, int8 [b, s]: that of its document, but
        GENERATION where a drawn image is predicted, or the ``<boi>`` before it."""
        task, document = np.asarray(self.task), np.asarray(self.document)
        predicted, same = task.copy(), document[:, 1:] == document[:, :-1]
        drawn = (np.asarray(self.modality) == Modality.IMAGE) & (task == Task.GENERATION)
        begins = same & drawn[:, 1:] & ~drawn[:, :-1]  # tokens before a drawn image: its <boi>
        predicted[:, :-1][begins] = Task.GENERATION
        predicted[:, :-2][same[:, :-1] & begins[:, 1:]] = Task.GENERATION
        return predicted

    def predicts_image(self) -> np.ndarray:
        """Whether the next token of the same document of a batch on the host is an image token, bool [b, s]."""
        image, document = np.asarray(self.modality) == Modality.IMAGE, np.asarray(self.document)
        predicts = np.zeros(document.shape, dtype=bool)
        predicts[:, :-1] = image[:, 1:] & (document[:, 1:] == document[:, :-1])
        return predicts

    @property
    def shape(self) -> tuple[int, int]:
        """(b, s)."""
        return tuple(self.tokens.shape)
