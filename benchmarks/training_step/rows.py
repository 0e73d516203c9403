"""Random rows that a step is timed on, and a batch as the training step wants it."""

import torch

from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.training import distributed

IMAGE, TEXT = 256, 24
DOCUMENT = IMAGE + TEXT


def step_input(batch: Batch, config: Config):
    """What ``train_step`` takes for a global batch that stands on the host."""
    return batch.to(distributed.device())


def random_rows(kind: str, rows: int, length: int, vocab_size: int) -> Batch:
    """Rows [rows, length] of random tokens.

    Args:
        kind: ``whole``: a document fills the row and every token has loss, as other libraries see any row.
            ``understanding``, ``generation``: as many documents of 256 image and 24 text tokens as fit, and padding,
            with their task's loss. ``both``: a row of one and a row of the other by turns.
    """
    if kind == "both":
        understanding, generation = (
            random_rows(task, rows, length, vocab_size) for task in ("understanding", "generation")
        )
        odd = (torch.arange(rows) % 2 == 1)[:, None]
        fields = ((getattr(understanding, name), getattr(generation, name)) for name in Batch.names())
        return Batch(*(torch.where(odd, second, first) for first, second in fields))
    batch = Batch(**{name: torch.zeros(rows, length, dtype=Batch.DTYPES[name]) for name in Batch.names()})
    batch.tokens[:] = torch.randint(0, vocab_size, (rows, length))
    batch.labels = batch.tokens.roll(-1, 1)
    document = length if kind == "whole" else DOCUMENT
    number, position = torch.arange(length) // document, torch.arange(length) % document
    batch.positions[:] = position
    batch.modality[:] = (position >= TEXT if kind == "generation" else position % DOCUMENT < IMAGE) * Modality.IMAGE
    batch.task[:] = Task.GENERATION if kind == "generation" else Task.UNDERSTANDING
    batch.document[:] = torch.where(number < length // document, number, PADDING_DOCUMENT)
    batch.loss_mask[:] = {
        "whole": 1,
        "understanding": batch.modality == Modality.TEXT,
        "generation": batch.modality == Modality.IMAGE,
    }[kind]
    batch.loss_mask[batch.document == PADDING_DOCUMENT] = 0
    return batch
