"""Tokens of documents as a batch that a model reads."""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.transformer.fp8 import row_multiple_of
from megatron_ext.transformer.model import UnifiedModel
from megatron_ext.vocabulary import Vocabulary


def document_batch(
    vocabulary: Vocabulary, tokens: Sequence[Sequence[int]], tasks: Sequence[Sequence[Task]], positions: Tensor
) -> Batch:
    """A batch of one document, or a chunk of it, per row, then padding. Labels are the next tokens; the loss mask is 0.

    Args:
        tasks: of each token.
        positions: [rows], position of each document's first token here.
    """
    lengths = torch.tensor([len(row) for row in tokens])
    longest = int(lengths.max())

    def padded(rows: Sequence[Sequence[int]], filler: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=dtype)

    ids = padded(tokens, vocabulary.pad, torch.int64)
    column = torch.arange(longest)
    return Batch(
        tokens=ids,
        labels=torch.nn.functional.pad(ids[:, 1:], (0, 1), value=vocabulary.pad),
        loss_mask=torch.zeros(ids.shape),
        positions=positions[:, None] + column,
        modality=torch.where(vocabulary.is_image(ids), Modality.IMAGE, Modality.TEXT).to(torch.int8),
        task=padded(tasks, int(Task.TEXT), torch.int8),
        document=torch.where(column < lengths[:, None], 0, PADDING_DOCUMENT).to(torch.int32),
    )


def row_alignment_of(model: UnifiedModel) -> tuple[int, int]:
    """The number of ranks over which the model's hidden states are cut, and the multiple of their rows: a model that is
    being trained keeps those of its training."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return size if model.config.sequence_parallel else 1, row_multiple_of(model.config)
