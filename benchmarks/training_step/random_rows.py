"""Random rows for timed steps, and the input that a training step takes for them."""

import torch

from megatron_ext import distributed
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task
from megatron_ext.training.prepare import StepInput, prepare
from megatron_ext.transformer.resolved import resolve

IMAGE, TEXT = 256, 24
DOCUMENT = IMAGE + TEXT


def step_input(batch: Batch, config: Config, vocab_size: int = 0, step: int | None = None) -> StepInput:
    """The input of ``train_step`` for a replica's rows of a global batch, on the device. A run prepares it ahead.

    Args:
        vocab_size: of the output head; 0: neither FLOPs nor the placement on context ranks count it.
        step: iteration of training, for roles that documents draw; None: the roles of evaluation.
    """
    resolved = resolve(config)
    selection = None if step is None else resolved.plan.selection(step, config.training.iterations)
    return prepare(batch, resolved, distributed.device(), vocab_size, selection)


def stored_order(batch: Batch, config: Config) -> torch.Tensor:
    """For each stored token of a micro-batch its flat index into the rows [b, s], [T]; -1 for a dummy."""
    resolved = resolve(config)
    route = Route.arrays(batch, resolved.plan, **resolved.rows.of_rank(0))
    return torch.as_tensor(route.order)


def random_rows(kind: str, rows: int, length: int, vocab_size: int) -> Batch:
    """Rows [rows, length] of random tokens.

    Args:
        kind: ``whole``: a document fills the row and every token has loss, as other libraries see any row.
            ``understanding``, ``generation``: as many documents of 256 image and 24 text tokens as fit, and padding,
            with their task's loss. ``both``: rows of understanding and of generation by turns.
    """
    if kind == "both":
        understanding, generation = (
            random_rows(task, rows, length, vocab_size) for task in ("understanding", "generation")
        )
        odd = (torch.arange(rows) % 2 == 1)[:, None]
        fields = ((getattr(understanding, name), getattr(generation, name)) for name in Batch.names())
        return Batch(*(torch.where(odd, second, first) for first, second in fields))
    batch = Batch.zeros(rows, length)
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
