"""A share of the data that takes the dense roles instead of the plan's, so that both tasks keep common pathways.

With ``documents``, a document takes the dense roles in all layers, or the plan's in all. The share may change during
training, for a schedule (dense first and reduced later, or the reverse). With ``image_tokens``, each image token is
selected by itself, so that some tokens of every image go through all layers.

The selection is a function of integers: the iteration and the document's tokens, or the iteration and the token's
position. So every rank, stage and layout selects the same, however the batch is split.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ext.data import counter_random
from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import Modality

_DOCUMENTS, _TOKENS = 1, 2  # purposes of random numbers


@dataclass(frozen=True)
class Selection:
    """The share of one step, whose random numbers depend on ``number``."""

    share: float
    number: int = 0


@dataclass(frozen=True)
class DenseShare:
    """The size of the share over training; see ``plan.dense_share`` of the configuration."""

    of: str
    start: float
    end: float
    begin_at: float
    end_at: float
    evaluation: float

    def selection(self, iteration: int, iterations: int) -> Selection:
        """The selection in an iteration of training, counted from 0. The share changes linearly from ``start`` to
        ``end`` between the fractions ``begin_at`` and ``end_at`` of training."""
        progress = iteration / iterations
        span = self.end_at - self.begin_at
        part = min(max((progress - self.begin_at) / span, 0.0), 1.0) if span else float(progress >= self.end_at)
        return Selection(self.start + part * (self.end - self.start), iteration + 1)

    def selected(self, batch: Batch, selection: Selection | None) -> np.ndarray:
        """Whether each token of rows on the host takes the dense roles, bool [b, s]; ``selection`` None: that of
        evaluation."""
        batch, selection = batch.arrays(), selection or Selection(self.evaluation)
        by_token = self.of == "image_tokens"
        if selection.share in (0.0, 1.0):
            taken = np.full(batch.shape, bool(selection.share))
        elif by_token:
            taken = counter_random.uniform(_TOKENS, selection.number, batch.positions) < selection.share
        else:
            taken = document_numbers(batch, selection.number) < selection.share
        return taken & (batch.modality == Modality.IMAGE) if by_token else taken

    def describe(self) -> str:
        """Describe the share in one line."""
        share = f"{self.start:g}"
        if self.start != self.end:
            share += f" to {self.end:g} between {self.begin_at:g} and {self.end_at:g} of training"
        return f"share of {self.of.replace('_', ' ')} with dense roles: {share}; {self.evaluation:g} in evaluation"


def document_numbers(batch: Batch, number: int) -> np.ndarray:
    """A number in [0, 1) for each document of a batch of arrays, float64 [b, s], from its tokens and ``number``."""
    document = batch.document_starts().ravel().cumsum() - 1
    token = counter_random.key(batch.positions.ravel(), batch.tokens.ravel())
    content = np.zeros(document.max() + 1, dtype=np.uint64)
    np.add.at(content, document, token)
    return counter_random.uniform(_DOCUMENTS, number, content)[document].reshape(batch.shape)
