"""Tokens of documents as rows that a model reads."""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality
from megatron_ext.transformer.fp8 import row_multiple_of
from megatron_ext.transformer.model import UnifiedModel
from megatron_ext.vocabulary import Vocabulary


def rows_of(vocabulary: Vocabulary, tokens: Sequence[Sequence[int]], tasks: Tensor, positions: Tensor) -> Batch:
    """One document, or a piece of it, in each row, with padding after it. Labels are the next tokens; no loss counts.

    Args:
        tasks, positions: [rows], task of each document and position of its first token here.
    """
    lengths = torch.tensor([len(row) for row in tokens])
    longest = int(lengths.max())
    ids = torch.tensor([[*row, *[vocabulary.pad] * (longest - len(row))] for row in tokens])
    within = torch.arange(longest)
    return Batch(
        tokens=ids,
        labels=torch.nn.functional.pad(ids[:, 1:], (0, 1), value=vocabulary.pad),
        loss_mask=torch.zeros(ids.shape),
        positions=positions[:, None] + within,
        modality=torch.where(vocabulary.is_image(ids), Modality.IMAGE, Modality.TEXT).to(torch.int8),
        task=tasks[:, None].expand(ids.shape),
        document=torch.where(within < lengths[:, None], 0, PADDING_DOCUMENT).to(torch.int32),
    )


def alignment(model: UnifiedModel) -> tuple[int, int]:
    """Over how many ranks the model's hidden states are cut, and what their rows are a multiple of: a model that is
    being trained has them as its training does."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return size if model.config.sequence_parallel else 1, row_multiple_of(model.config)
