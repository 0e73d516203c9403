"""Tokens of documents as a batch that a model reads.

Prompts and continuations hold an image token of D codes as data sets store it, as D ids. A model reads it as one token,
with the id of its first code, and its codes beside it.
"""

from collections.abc import Iterable, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.generation.pipelined_model import PipelinedModel
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.transformer.fp8 import row_multiple_of
from megatron_ext.vocabulary import Vocabulary


def split_codes(vocabulary: Vocabulary, ids: Sequence[int], depth: int) -> tuple[list[int], list[list[int]]]:
    """Ids as they are stored to the tokens that a model reads, and the ``depth`` codes of each image token among them;
    no codes if ``depth`` is 1."""
    if depth == 1:
        return list(ids), []
    codes = [token - vocabulary.image_offset for token in ids if vocabulary.is_image(token)]
    tokens, image_ids = [], 0
    for token in ids:
        if vocabulary.is_image(token):
            image_ids += 1
            if image_ids % depth != 1:
                continue
        tokens.append(token)
    return tokens, [codes[start : start + depth] for start in range(0, len(codes), depth)]


def stored_ids(vocabulary: Vocabulary, tokens: Sequence[int], codes: Iterable[Sequence[int]]) -> list[int]:
    """The inverse of :func:`split_codes`."""
    codes, ids = iter(codes), []
    for token in tokens:
        several = next(codes, None) if vocabulary.is_image(token) else None
        ids += [token] if several is None else [vocabulary.image_offset + code for code in several]
    return ids


def document_batch(
    vocabulary: Vocabulary,
    tokens: Sequence[Sequence[int]],
    tasks: Sequence[Sequence[Task]],
    positions: Tensor,
    depth: int = 1,
    codes: Sequence[Sequence[Sequence[int]]] = (),
) -> Batch:
    """A batch of one document, or a chunk of it, per row, then padding. Labels are the next tokens; the loss mask is 0.

    Args:
        tasks: of each token.
        positions: [rows], position of each document's first token here.
        depth: codes of an image token.
        codes: of each row's image tokens, if there are several of each.
    """
    lengths = torch.tensor([len(row) for row in tokens])
    longest = int(lengths.max())

    def padded(rows: Sequence[Sequence[int]], filler: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=dtype)

    ids = padded(tokens, vocabulary.pad, torch.int64)
    image, column = vocabulary.is_image(ids), torch.arange(longest)
    all_codes = None
    if depth > 1:
        all_codes = torch.zeros(*ids.shape, depth, dtype=torch.int32)
        all_codes[image] = torch.tensor([token for row in codes for token in row], dtype=torch.int32).view(-1, depth)
    return Batch(
        tokens=ids,
        labels=torch.nn.functional.pad(ids[:, 1:], (0, 1), value=vocabulary.pad),
        loss_mask=torch.zeros(ids.shape),
        positions=positions[:, None] + column,
        modality=torch.where(image, Modality.IMAGE, Modality.TEXT).to(torch.int8),
        task=padded(tasks, int(Task.TEXT), torch.int8),
        document=torch.where(column < lengths[:, None], 0, PADDING_DOCUMENT).to(torch.int32),
        codes=all_codes,
    )


def row_alignment_of(model: PipelinedModel) -> tuple[int, int]:
    """The number of ranks over which the model's hidden states are cut, and the multiple of their rows: a model that is
    being trained keeps those of its training."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return size if model.config.sequence_parallel else 1, row_multiple_of(model.config)
