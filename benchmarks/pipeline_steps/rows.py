"""Packed rows of understanding and generation, and what each part of the model costs for each of them."""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_ext.config import ModelConfig
from megatron_ext.data.batch import Batch
from megatron_ext.routing.flops import count, head_flops, layer_flops, projector_flops
from megatron_ext.routing.pipeline_balance import ModelCosts
from megatron_ext.routing.plan import Plan
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task


@dataclass(frozen=True)
class Documents:
    """Lengths of documents, half of them of understanding (an image, a question, an answer with loss), half of
    generation (a caption, an image with loss). Text lengths are log-normal.

    Attributes:
        image: tokens of an image.
        question, answer, caption: medians of the lengths.
        spread: of the logarithm of a length.
    """

    image: int = 576
    question: int = 60
    answer: int = 80
    caption: int = 40
    spread: float = 0.8

    def draw(self, random: np.random.Generator) -> list[tuple[int, Modality, Task, bool]]:
        """A document as runs of (length, modality, task, loss)."""
        question, answer, caption = (
            max(2, round(median * np.exp(self.spread * random.standard_normal())))
            for median in (self.question, self.answer, self.caption)
        )
        if random.random() < 0.5:
            task = Task.UNDERSTANDING
            return [
                (self.image, Modality.IMAGE, task, False),
                (question, Modality.TEXT, task, False),
                (answer, Modality.TEXT, task, True),
            ]
        task = Task.GENERATION
        return [(caption, Modality.TEXT, task, False), (self.image, Modality.IMAGE, task, True)]


def drawn_rows(documents: Documents, rows: int, length: int, vocab_size: int, seed: int) -> Batch:
    """Rows [rows, length], each filled with documents until the next one does not fit."""
    random = np.random.default_rng(seed)
    batch = Batch.zeros(rows, length)
    batch.tokens[:] = torch.from_numpy(random.integers(0, vocab_size, (rows, length)))
    batch.labels[:] = batch.tokens.roll(-1, 1)
    batch.document[:] = PADDING_DOCUMENT
    runs = documents.draw(random)
    for row in range(rows):
        start = number = 0
        while start + (total := sum(size for size, *_ in runs)) <= length:
            batch.document[row, start : start + total] = number
            batch.positions[row, start : start + total] = torch.arange(total)
            for size, modality, task, loss in runs:
                stop = start + size
                batch.modality[row, start:stop] = int(modality)
                batch.task[row, start:stop] = int(task)
                batch.loss_mask[row, start:stop] = float(loss)
                start = stop
            number, runs = number + 1, documents.draw(random)
        if not number:
            raise ValueError(f"a document of {total} tokens does not fit into a row of {length}")
    return batch


def row_flops(model: ModelConfig, vocab_size: int, plan: Plan, batch: Batch) -> np.ndarray:
    """FLOPs of a forward pass, float64 [rows, layers + 2]: of each layer, of what is before the layers, and after."""
    table = []
    for row in range(batch.shape[0]):
        counts = count(batch.rows(row, row + 1), plan)
        ends = [projector_flops(model, counts), head_flops(model, vocab_size, counts)]
        table.append([*layer_flops(model, plan, counts), *ends])
    return np.array(table, dtype=np.float64)


def model_costs(flops: np.ndarray, micro_batches: list[np.ndarray], scale: float = 1.0) -> ModelCosts:
    """Costs of micro-batches, each given by the numbers of its rows; ``flops`` is that of :func:`row_flops`."""
    *layers, first, last = (scale * np.stack([flops[rows].sum(0) for rows in micro_batches], 1)).tolist()
    return ModelCosts(layers, first, last)
