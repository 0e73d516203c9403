"""A share of the data that takes the dense roles instead of the plan's, so that both tasks keep pathways in common.

Of ``documents``: each takes the dense roles in all layers, or the plan's in all. The share may change in the course of
training, which makes schedules of it (dense first and reduced later, or the reverse). Of ``image_tokens``: each image
token by itself, so that every image has a few that go through all layers.

Who is drawn is a function of integers alone: of the iteration and the document's tokens, or of the iteration and the
token's position. So every rank, stage and layout draws alike, however the batch is cut.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ext.data import counter_random
from megatron_ext.data.batch import Batch
from megatron_ext.token_classes import Modality

_DOCUMENTS, _TOKENS = 1, 2  # what a random number is for


@dataclass(frozen=True)
class Selection:
    """The share of one step; ``number`` tells the draws of one step from those of another."""

    share: float
    number: int = 0


@dataclass(frozen=True)
class DenseShare:
    """How large the share is, as ``plan.dense_share`` of the configuration describes it."""

    of: str
    start: float
    end: float
    begin_at: float
    end_at: float
    evaluation: float

    def selection(self, iteration: int, iterations: int) -> Selection:
        """Of an iteration of training, counted from 0: the share goes from ``start`` to ``end`` in a straight line
        between the parts ``begin_at`` and ``end_at`` of training."""
        done = iteration / iterations
        span = self.end_at - self.begin_at
        way = min(max((done - self.begin_at) / span, 0.0), 1.0) if span else float(done >= self.end_at)
        return Selection(self.start + way * (self.end - self.start), iteration + 1)

    def taken(self, batch: Batch, selection: Selection | None) -> np.ndarray:
        """Which tokens of rows on the host take the dense roles, bool [b, s]; ``selection`` None: as in evaluation."""
        batch, selection = batch.arrays(), selection or Selection(self.evaluation)
        of_tokens = self.of == "image_tokens"
        if selection.share in (0.0, 1.0):
            taken = np.full(batch.shape, bool(selection.share))
        elif of_tokens:
            taken = counter_random.uniform(_TOKENS, selection.number, batch.positions) < selection.share
        else:
            taken = _document_lots(batch, selection.number) < selection.share
        return taken & (batch.modality == Modality.IMAGE) if of_tokens else taken

    def describe(self) -> str:
        """One line."""
        share = f"{self.start:g}"
        if self.start != self.end:
            share += f" to {self.end:g} between {self.begin_at:g} and {self.end_at:g} of training"
        return f"share of {self.of.replace('_', ' ')} with dense roles: {share}; {self.evaluation:g} in evaluation"


def _document_lots(batch: Batch, number: int) -> np.ndarray:
    """A number in [0, 1) for each document, float64 [b, s], from what is in it."""
    document = batch.document_starts().ravel().cumsum() - 1
    token = counter_random.key(batch.positions.ravel(), batch.tokens.ravel())
    content = np.zeros(document.max() + 1, dtype=np.uint64)
    np.add.at(content, document, token)
    return counter_random.uniform(_DOCUMENTS, number, content)[document].reshape(batch.shape)
