"""Prepares the input of a training step from its rows on the host: routes, labels, FLOPs.

This module does not import torch: it runs in the worker processes that pack rows, while the device is busy with earlier
steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_ext.config import Config, ModelConfig
from megatron_ext.data.batch import Batch
from megatron_ext.data.packed_tokens import unpack
from megatron_ext.routing.context import Placement
from megatron_ext.routing.dense_share import Selection
from megatron_ext.routing.flops import TRAINING_PER_FORWARD, count, dense, forward_flops, layer_flops, query_width
from megatron_ext.routing.groups import stored_length
from megatron_ext.routing.image_code_costs import depth_head_multiply_adds
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.route import Route, placed
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task

if TYPE_CHECKING:
    import torch

    from megatron_ext.transformer.resolved import ResolvedConfig, RowLayout

NO_TASK = len(Task)
"""Stands for the task of a filler target, whose cross-entropy does not count."""


@dataclass
class MicroBatch:
    """The input of a forward pass: the route, and what its targets predict, int64.

    Attributes:
        labels: [n], ids of the tokens that the logits predict.
        tasks: [n + m], the task that the loss counts to (:meth:`~megatron_ext.data.batch.Batch.predicted_task`), of
            these n targets and then of the route's m code targets.
        modalities: [n + m], modality of the predicted tokens; None where the loss does not tell image tokens from text.
    """

    route: Route
    labels: np.ndarray
    tasks: np.ndarray
    modalities: np.ndarray | None


@dataclass
class StepInput:
    """The input of one step from a replica's rows; arrays on the host, tensors on a device.

    Attributes:
        loss_tokens: number of targets of each task, then of those that predict image tokens, float64 [tasks + 1]; the
            last is 0 where the loss does not tell image tokens from text.
        flops, dense_flops: training FLOPs under the plan and under the dense plan; padding has none.
        stack_flops: with several codes an image token, both of the layers alone.
        tokens: number of tokens without padding.
        stored_length: T of the hidden states that pipeline stages exchange, over all ranks.
        others: the micro-batches of context ranks 1, 2, ...; ``micro_batches`` are those of context rank 0. Empty once
            this is the input of one rank.
    """

    micro_batches: list[MicroBatch]
    loss_tokens: np.ndarray
    flops: int
    dense_flops: int
    stack_flops: tuple[int, ...]
    tokens: int
    stored_length: int
    others: list[list[MicroBatch]] = field(default_factory=list)

    def of_rank(self, context_rank: int) -> StepInput:
        """The input of one context rank."""
        return replace(self, micro_batches=[self.micro_batches, *self.others][context_rank], others=[])

    def to(self, device: torch.device | str) -> StepInput:
        """The same input on ``device``, in one copy that the host does not wait for."""
        from megatron_ext.data.transfer import to_device

        return to_device(self, device)


@dataclass(frozen=True)
class Preparation:
    """Turns rows into a :class:`StepInput`; small, and the same for every step of a run.

    Attributes:
        vocab_size: for the FLOPs of the output layer.
        micro_batch_size: rows of a micro-batch; rows of padding fill it up.
        by_task: each row holds one task; rows of one task are placed together.
        pad, image_offset: ids of the padding token and of VQ code 0.
        iterations: length of the run, for a dense share that changes during training; None: the share of evaluation.
        image_loss: the loss tells image tokens from text, see :func:`summed_depths`.
    """

    plan: Plan
    model: ModelConfig
    vocab_size: int
    micro_batch_size: int
    row_layout: RowLayout
    sequence_length: int
    by_task: bool = False
    pad: int = 0
    image_offset: int = 0
    iterations: int | None = None
    image_loss: bool = False

    @classmethod
    def of(
        cls,
        resolved: ResolvedConfig,
        vocab_size: int = 0,
        pad: int = 0,
        training: bool = True,
        image_offset: int = 0,
    ) -> Preparation:
        """The preparation for a run's steps in training or evaluation."""
        config = resolved.config
        return cls(
            plan=resolved.plan,
            model=config.model,
            vocab_size=vocab_size,
            micro_batch_size=config.training.micro_batch_size,
            row_layout=resolved.rows,
            sequence_length=config.data.sequence_length,
            by_task=config.data.rows == "by_task",
            pad=pad,
            image_offset=image_offset,
            iterations=config.training.iterations if training else None,
            image_loss=summed_depths(config) > 0,
        )

    def __call__(self, packed_tokens: np.ndarray, step: int) -> StepInput:
        """The input of a step, counted from 0, from rows of packed tokens."""
        selection = None if self.iterations is None else self.plan.selection(step, self.iterations)
        return self.step_input(
            unpack(packed_tokens, self.pad, self.model.image_codes.depth, self.image_offset), selection
        )

    def step_input(self, batch: Batch, selection: Selection | None = None) -> StepInput:
        """The input of a step from a batch on the host; ``selection`` None: that of evaluation."""
        batch = batch.arrays()
        if self.by_task:
            order = np.argsort(batch.task[:, 0], kind="stable")
            batch = batch.map(lambda field: field[order])
        layout = self.row_layout
        starts = range(0, batch.shape[0], self.micro_batch_size)
        tokens = self.micro_batch_size * self.sequence_length
        parts = [batch.rows(start, start + self.micro_batch_size) for start in starts]
        plans = self.plan, dense(self.plan)
        counts = [count(batch, plan, selection) for plan in plans]
        flops, dense_flops = (
            TRAINING_PER_FORWARD * forward_flops(self.model, self.vocab_size, plan, counted)
            for plan, counted in zip(plans, counts)
        )
        stack = zip(plans, counts) if self.model.image_codes.depth > 1 else ()
        tasks, images = batch.predicted_task(), batch.predicts_image() if self.image_loss else None
        learnt = batch.loss_mask > 0
        numbers = [(learnt & (tasks == task)).sum() for task in Task]
        numbers.append(0 if images is None else (learnt & images).sum())
        rows = [slice(start, start + self.micro_batch_size) for start in starts]
        of_parts = [
            self._of_ranks(part, tasks[of_part], None if images is None else images[of_part], selection)
            for of_part, part in zip(rows, parts)
        ]
        of_ranks = [list(micro_batches) for micro_batches in zip(*of_parts)]
        return StepInput(
            micro_batches=of_ranks[0],
            loss_tokens=np.array(numbers, np.float64),
            flops=flops,
            dense_flops=dense_flops,
            stack_flops=tuple(TRAINING_PER_FORWARD * sum(layer_flops(self.model, *of_plan)) for of_plan in stack),
            tokens=sum(counts[0].tokens),
            stored_length=stored_length(tokens, self.plan, layout.ranks * layout.context, layout.multiple),
            others=of_ranks[1:],
        )

    def _of_ranks(
        self, part: Batch, predicted: np.ndarray, images: np.ndarray | None, selection: Selection | None
    ) -> list[MicroBatch]:
        """The input of each context rank."""
        if (part.document == PADDING_DOCUMENT).all():
            part, predicted = _one_token(part)
        rows, placement = self.row_layout, self.placement(part, selection)
        return [
            self._micro_batch(part, predicted, images, selection, rows.of_rank(rank) | {"placement": placement})
            for rank in range(rows.context)
        ]

    def placement(self, part: Batch, selection: Selection | None = None) -> Placement | None:
        """The context rank of each token of a micro-batch of arrays; None: there is one."""
        rows, model = self.row_layout, self.model
        if rows.context == 1:
            return None
        head_costs = np.full(part.shape, model.hidden_size * self.vocab_size)
        if part.codes is not None:
            head_costs[part.predicts_image()] = depth_head_multiply_adds(model)
        head_costs *= (part.loss_mask > 0) & (part.document != PADDING_DOCUMENT)
        costs = 2 * query_width(model), head_costs
        return placed(part, self.plan, rows.context, rows.ranks, rows.multiple, selection, *costs)

    def _micro_batch(
        self, part: Batch, predicted: np.ndarray, images: np.ndarray | None, selection: Selection | None, options: dict
    ) -> MicroBatch:
        rows = self.row_layout
        route = Route.arrays(part, self.plan, selection=selection, code_mask=images, **options)
        targets = [route.targets] if route.code_targets is None else [route.targets, route.code_targets]
        modalities = None
        if images is not None:
            modalities = _of_targets(images * Modality.IMAGE, targets, rows.fill, Modality.TEXT)
        micro_batch = MicroBatch(
            route,
            labels=_of_targets(part.labels, targets[:1], rows.fill, 0),
            tasks=_of_targets(predicted, targets, rows.fill, NO_TASK),
            modalities=modalities,
        )
        # Only the host uses these.
        route.targets = route.code_targets = route.order = None
        if not self.model.max_image_tokens:
            route.image_places = None
        return micro_batch


def _one_token(padding: Batch) -> tuple[Batch, np.ndarray]:
    """In place of a micro-batch of padding, a token that predicts nothing that counts, and the tasks of its targets: so
    no kernel meets an empty tensor, and all parameters take part on every replica."""
    batch = padding.map(np.array)
    batch.document[0, 0], batch.loss_mask[0, 0] = 0, 1
    return batch, np.full(batch.shape, NO_TASK, dtype=np.int8)


def summed_depths(config: Config) -> int:
    """Number of depths whose losses are summed apart; 0 where the loss does not tell image tokens from text."""
    depth = config.model.image_codes.depth
    return depth if depth > 1 or config.training.means == "modality" else 0


def _of_targets(values: np.ndarray, targets: list[np.ndarray], multiple: int, filler: int) -> np.ndarray:
    """The values [b, s] of each list of targets, one after the other; each list is filled up to a ``multiple``."""
    lists = [np.pad(values.ravel()[t], (0, -t.size % multiple), constant_values=filler) for t in targets]
    return np.concatenate(lists).astype(np.int64)


def prepare(
    batch: Batch,
    resolved: ResolvedConfig,
    device: torch.device | str = "cpu",
    vocab_size: int = 0,
    selection: Selection | None = None,
) -> StepInput:
    """The input of this rank, on ``device``, of a step over a batch on the host.

    Args:
        vocab_size: of the output head; 0: neither FLOPs nor the placement on context ranks count it.
        selection: that of a training iteration, :meth:`~megatron_ext.routing.plan.Plan.selection`; None: that of
            evaluation.
    """
    return own_share(Preparation.of(resolved, vocab_size, training=False).step_input(batch, selection)).to(device)


def own_share(step: StepInput) -> StepInput:
    """The input of this process, of those of all context ranks."""
    if not step.others:
        return step
    from megatron.core import parallel_state  # Imported late: worker processes need neither it nor torch.

    return step.of_rank(parallel_state.get_context_parallel_rank())
