"""A share of the data that takes the dense roles instead of the plan's, so that both tasks keep pathways in common.

A share of ``documents`` selects whole documents, which take the dense roles in every layer; the others follow the plan.
The share may change during training, for schedules such as dense first and reduced later, or the reverse. A share of
``image_tokens`` selects each image token independently, so that a few tokens of every image go through all layers.

The selection depends on integers alone: the iteration and the document's tokens, or the iteration and the token's
position. Every rank, stage and layout therefore selects the same tokens, however the batch is cut.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ext.data import counter_random
from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import Modality

_DOCUMENTS, _TOKENS = 1, 2  # keys that separate the two random streams


@dataclass(frozen=True)
class Selection:
    """The share of one step; ``number`` makes each step's random numbers its own."""

    share: float
    number: int = 0


@dataclass(frozen=True)
class DenseShare:
    """The size of the share over training, as the configuration's ``plan.dense_share`` describes it."""

    of: str
    start: float
    end: float
    begin_at: float
    end_at: float
    evaluation: float

    def selection(self, iteration: int, iterations: int) -> Selection:
        """The selection of a training iteration, counted from 0: the share changes linearly from ``start`` to ``end``
        between the fractions ``begin_at`` and ``end_at`` of training."""
        done = iteration / iterations
        span = self.end_at - self.begin_at
        progress = min(max((done - self.begin_at) / span, 0.0), 1.0) if span else float(done >= self.end_at)
        return Selection(self.start + progress * (self.end - self.start), iteration + 1)

    def selected(self, batch: Batch, selection: Selection | None) -> np.ndarray:
        """Whether each token of rows on the host takes the dense roles, bool [b, s]; ``selection`` None: that of
        evaluation."""
        batch, selection = batch.arrays(), selection or Selection(self.evaluation)
        of_tokens = self.of == "image_tokens"
        if selection.share in (0.0, 1.0):
            selected = np.full(batch.shape, bool(selection.share))
        elif of_tokens:
            selected = counter_random.uniform(_TOKENS, selection.number, batch.positions) < selection.share
        else:
            selected = _document_values(batch, selection.number) < selection.share
        return selected & (batch.modality == Modality.IMAGE) if of_tokens else selected

    def describe(self) -> str:
        """One line for the table of a plan."""
        share = f"{self.start:g}"
        if self.start != self.end:
            share += f" to {self.end:g} between {self.begin_at:g} and {self.end_at:g} of training"
        return f"share of {self.of.replace('_', ' ')} with dense roles: {share}; {self.evaluation:g} in evaluation"


def _document_values(batch: Batch, number: int) -> np.ndarray:
    """A random number in [0, 1) for each document, float64 [b, s], derived from its tokens and their positions."""
    document = batch.document_starts().ravel().cumsum() - 1
    token = counter_random.key(batch.positions.ravel(), batch.tokens.ravel())
    content = np.zeros(document.max() + 1, dtype=np.uint64)
    np.add.at(content, document, token)
    return counter_random.uniform(_DOCUMENTS, number, content)[document].reshape(batch.shape)
