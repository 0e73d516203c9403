"""The documents that are continued: prompts of random tokens, and which tokens may follow."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.generation.generator import Request
from megatron_ext.token_classes import Modality, Task

GRID = (16, 16)
IMAGE, TEXT, ANSWER = GRID[0] * GRID[1], 24, 64
KINDS = {"picture": Task.GENERATION, "answer": Task.UNDERSTANDING}


class TokenIds:
    """The token ids of a vocabulary as large as that of ``benchmarks/step_time.py``, without its text model."""

    text_size, image_offset, size = 2044, 2048, 4096
    bos, pad, eod, boi, eoi = 1, 2044, 2045, 2046, 2047
    ends = [eod]

    @classmethod
    def is_image(cls, ids):
        return ids >= cls.image_offset


def new_tokens(kind: str) -> int:
    """Number of tokens that continue a prompt; the <eoi> of a picture is not chosen."""
    return IMAGE if kind == "picture" else ANSWER


def requests(kind: str, rows: int) -> list[Request]:
    """Prompts of random tokens."""
    random = torch.Generator().manual_seed(rows)
    text = torch.randint(3, TokenIds.text_size, (rows, TEXT - 2), generator=random).tolist()
    image = torch.randint(TokenIds.image_offset, TokenIds.size, (rows, IMAGE), generator=random).tolist()
    if kind == "picture":
        return [Request([TokenIds.bos, *t, TokenIds.boi], Task.GENERATION, images=1) for t in text]
    prompts = ([TokenIds.bos, TokenIds.boi, *i, TokenIds.eoi, *t[1:]] for t, i in zip(text, image))
    return [Request(prompt, Task.UNDERSTANDING, text_tokens=ANSWER) for prompt in prompts]


def allowed(kind: str) -> Tensor:
    """Tokens that may be chosen, bool [vocabulary]."""
    ids = torch.arange(TokenIds.size)
    if kind == "picture":
        return TokenIds.is_image(ids)
    return (ids < TokenIds.text_size) & (ids != TokenIds.bos) | (ids == TokenIds.eod)


def document_rows(kind: str, tokens: Sequence[Sequence[int]], asked: int) -> Batch:
    """Rows of equally long documents in which the last ``asked`` tokens have logits."""
    ids = torch.tensor(tokens)
    batch = Batch.zeros(*ids.shape)
    batch.tokens[:], batch.positions[:] = ids, torch.arange(ids.shape[1])
    batch.modality[:] = TokenIds.is_image(ids) * Modality.IMAGE
    batch.task[:] = KINDS[kind]
    batch.loss_mask[:, ids.shape[1] - asked :] = 1
    return batch
