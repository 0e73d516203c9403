"""The cost of packed rows under a plan, before they are rendered: FLOPs of a forward pass, as exact integers.

Rows are costed to be spread over replicas and micro-batches (:mod:`megatron_ext.data.composition`). Which documents or
tokens a dense share selects, or which table they draw, depends on their content, so a row then costs what is expected.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ext.config import ModelConfig
from megatron_ext.data.row_contents import RowContents
from megatron_ext.routing.flops import (
    NUM_CLASSES,
    Counts,
    class_flops,
    dense,
    head_flops,
    projector_flops,
    query_width,
)
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role, class_index
from megatron_ext.token_classes import Modality

_SHARES = 1 << 10  # to which parts of the tokens are rounded


@dataclass(frozen=True)
class RowCosts:
    """``row_costs(contents, step)`` is the cost of each row in a step, int64 [rows].

    Attributes:
        vocab_size: rows of the output head.
        iterations: length of the run, for a dense share that changes during training; None: the share of evaluation.
    """

    plan: Plan
    model: ModelConfig
    vocab_size: int
    iterations: int | None = None

    def __call__(self, contents: RowContents, step: int) -> np.ndarray:
        costs = self._head(contents)
        for plans, part in self._parts(step):
            if part:
                layers = sum(self._layers(contents, plan) // len(plans) for plan in plans)
                costs = costs + (layers if part == 1 else layers // _SHARES * round(_SHARES * part))
        return costs

    def _parts(self, step: int) -> list[tuple[list[Plan], float]]:
        """Plans, and the part of the tokens that is expected to take one of them in a step, each as likely."""
        plan, share, drawn = self.plan, self.plan.dense_share, self.plan.drawn_tables
        if drawn and self.iterations is not None:
            tables = [plan.with_table(1 + number) for number in range(drawn.count)]
            return [([plan], drawn.own), (tables, 1 - drawn.own)]
        if not share:
            return [([plan], 1)]
        part = share.evaluation if self.iterations is None else share.selection(step, self.iterations).share
        return [([plan], 1 - part), ([dense(plan)], part)]

    def _layers(self, contents: RowContents, plan: Plan) -> np.ndarray:
        """FLOPs of the layers for each row under the roles of the plan's own table."""
        kind = class_index(contents.task, contents.modality)
        rows = len(contents.learnt)
        tokens = np.bincount(NUM_CLASSES * contents.row + kind, contents.length, NUM_CLASSES * rows).astype(np.int64)
        costs = tokens.reshape(rows, NUM_CLASSES) @ self._of_token(plan)
        for roles in set(plan.roles):
            pairs = np.bincount(contents.row, _visible(contents, np.array(roles)[kind]), rows).astype(np.int64)
            costs += plan.roles.count(roles) * 4 * query_width(self.model) * pairs
        return costs

    def _of_token(self, plan: Plan) -> np.ndarray:
        """FLOPs of all layers for a token of each class, without attention, int64 [classes]."""
        classes = len(plan.roles[0])
        one_each = Counts((1,) * classes, ((0,) * classes,) * plan.num_layers, logits=0)
        return np.array(class_flops(self.model, plan, one_each), dtype=np.int64).sum(axis=0)[:NUM_CLASSES]

    def _head(self, contents: RowContents) -> np.ndarray:
        """FLOPs of the projector and the heads for each row."""
        logit, image, code = (Counts((), (), *ends) for ends in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
        of_logit = head_flops(self.model, self.vocab_size, logit)
        if self.model.image_codes.depth == 1:
            return of_logit * contents.learnt
        images = contents.row[contents.modality == Modality.IMAGE]
        lengths = contents.length[contents.modality == Modality.IMAGE]
        tokens = np.bincount(images, lengths, len(contents.learnt)).astype(np.int64)
        of_code = head_flops(self.model, self.vocab_size, code) - of_logit
        ends = of_logit * contents.learnt + of_code * contents.learnt_images
        return ends + projector_flops(self.model, image) * tokens


def _visible(contents: RowContents, role: np.ndarray) -> np.ndarray:
    """(query, key) pairs of each run, whose tokens have these roles, int64 [runs]."""
    keys = np.where(role == Role.SKIP, 0, contents.length)
    before = np.cumsum(keys) - keys
    starts = np.flatnonzero(np.diff(contents.document, prepend=-1))
    before -= before[starts][contents.document]
    return (role == Role.FULL) * contents.length * (2 * before + contents.length + 1) // 2
