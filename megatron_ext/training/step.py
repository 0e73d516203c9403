"""One training step, and one validation step, over Megatron-Core's pipeline schedules."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_ext.config import Config, TaskWeights
from megatron_ext.data.batch import Batch
from megatron_ext.routing.dense_share import Draw
from megatron_ext.routing.groups import stored_length
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.route import Route
from megatron_ext.token_classes import Task
from megatron_ext.training.losses import loss_token_counts, task_sums, token_weights
from megatron_ext.transformer.fp8 import row_multiple
from megatron_ext.transformer.specs import fp8_recipe


@dataclass
class MicroBatch:
    """What a forward pass needs of its rows, worked out once: the route, and of the n tokens with loss the label, the
    task and the weight in the objective, each [n]."""

    route: Route
    labels: Tensor
    tasks: Tensor
    weights: Tensor


@dataclass
class StepResult:
    """What one step over the global batch gave, the same on every rank.

    Attributes:
        loss: the objective.
        task_losses: mean cross-entropy per task, for the tasks that had loss tokens.
        grad_norm: global gradient norm before clipping; nan when there was no backward pass.
        tally: sums over the ranks of what they gave as ``tally``.
        applied: whether the optimizer took the step.
    """

    loss: float
    task_losses: dict[str, float]
    grad_norm: float
    tally: list[float]
    applied: bool


def configure(model_config) -> None:
    """Tell Megatron-Core's schedules how gradients are finished: summed, since the objective is already normalised."""
    model_config.calculate_per_token_loss = True
    model_config.finalize_model_grads_func = lambda model, num_tokens, **groups: finalize_model_grads(
        model, None, **groups
    )


def train_step(
    chunks: list,
    optimizer,
    batch: Batch,
    config: Config,
    accept: Callable[[float, float], bool] = lambda loss, grad_norm: math.isfinite(loss) and math.isfinite(grad_norm),
    tally: Sequence[float] = (),
    draw: Draw | None = None,
) -> StepResult:
    """Forward, backward and optimizer step over the global batch.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism.
        batch: this replica's rows of the global batch, the same on all its ranks.
        accept: told the loss and the gradient norm, whether to apply the step. It must answer alike on every rank;
            all of them are given the same numbers.
        tally: numbers of this rank to be summed over all ranks on the way (its wish to stop, its share of the work).
        draw: of the plan's dense share; None: as in evaluation.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    counts, sums = _run(chunks, batch, config, forward_only=False, draw=draw)
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    loss, task_losses, tally = _reduce(sums, counts, config, tally)
    applied = accept(loss, grad_norm)
    if applied:
        if 0 < config.optimizer.clip_grad < grad_norm:
            limit = config.optimizer.clip_grad
            torch.nn.utils.clip_grads_with_norm_(optimizer.get_parameters(), limit, torch.tensor(grad_norm))
        optimizer.step_with_ready_grads()
    return StepResult(loss, task_losses, grad_norm, tally, applied)


@contextmanager
def evaluation_mode(chunks: list) -> Iterator[None]:
    """The model in evaluation mode, and in training mode again afterwards."""
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.train()


@torch.no_grad()
def evaluate_step(chunks: list, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """Forward pass over the global batch.

    Returns:
        Sums [tasks] of cross-entropy over the global batch and the counts [tasks] of loss tokens, float64, the same
        on every rank.
    """
    counts, sums = _run(chunks, batch, config, forward_only=True)
    return _sum_over_world(sums), counts


def task_gradients(chunks: list, batch: Batch, config: Config, task: Task, draw: Draw | None = None) -> None:
    """Forward and backward pass for one task's mean cross-entropy over the global batch.

    Afterwards ``main_grad`` of every parameter (this rank's slice of it) is its gradient, whole on every replica, also
    where the optimizer is sharded over them. Nothing else has changed: the next step zeroes these buffers.
    """
    alone = TaskWeights(**{other.name.lower(): float(other == task) for other in Task})
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, task_weights=alone))
    for chunk in chunks:
        chunk.zero_grad_buffer()
        # The optimizer's last step may have left the buffers here too, and gradients would be added to them twice.
        chunk.zero_grad(set_to_none=True)
        chunk.force_all_reduce = True  # for gradients that are reduced as they become ready
    try:
        _run(chunks, batch, config, forward_only=False, draw=draw, force_all_reduce=True)
    finally:
        for chunk in chunks:
            chunk.force_all_reduce = False


def _run(
    chunks, batch: Batch, config: Config, forward_only: bool, draw: Draw | None = None, **options
) -> tuple[Tensor, Tensor]:
    counts = loss_token_counts(batch)
    micro_batches = _cut(batch, counts, config, draw)
    sums = torch.zeros(len(Task), dtype=torch.float64, device=counts.device)
    for result in get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        # The length of hidden states; the schedule itself cuts it over the ranks of sequence parallelism.
        seq_length=_stored_length(config),
        micro_batch_size=1,
        forward_only=forward_only,
        **options,
    ):
        sums += result
    return counts, sums


def _cut(batch: Batch, counts: Tensor, config: Config, draw: Draw | None) -> list[MicroBatch]:
    """The micro-batches of a step. Their routes are made on the host, from one copy of the batch's integers."""
    plan, device, host = _plan(config), batch.tokens.device, batch.to("cpu")
    weights = token_weights(host, counts.cpu(), config.training.task_weights)
    made = []
    for start in range(0, batch.shape[0], config.training.micro_batch_size):
        rows = slice(start, start + config.training.micro_batch_size)
        part = host.rows(rows.start, rows.stop)
        route = Route.of(part, plan, *_alignment(config), fixed_length=config.parallel.pipeline > 1, draw=draw)
        of_targets = (x.flatten()[route.targets] for x in (part.labels, part.task.long(), weights[rows]))
        made.append(MicroBatch(route.to(device), *(x.to(device, non_blocking=True) for x in of_targets)))
    return made


def _plan(config: Config) -> Plan:
    return Plan.of(config.plan, config.model.num_layers)


def _alignment(config: Config) -> tuple[int, int]:
    """Ranks that hidden states are cut over, and what their rows are a multiple of."""
    ranks = config.parallel.tensor if config.parallel.sequence else 1
    return ranks, row_multiple(fp8_recipe(config))


def _stored_length(config: Config) -> int:
    tokens = config.training.micro_batch_size * config.data.sequence_length
    return stored_length(tokens, _plan(config), *_alignment(config))


def _forward(micro_batches, chunk):
    micro_batch = next(micro_batches)
    return chunk(micro_batch.route), partial(_loss, micro_batch, get_attr_wrapped_model(chunk, "token_losses"))


def _loss(micro_batch: MicroBatch, token_losses: Callable, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The share of the objective in this micro-batch. Called by the schedule on the last stage only."""
    losses = token_losses(logits, micro_batch.labels)
    objective = (losses * micro_batch.weights).sum()
    return objective, torch.zeros((), dtype=torch.int, device=objective.device), task_sums(losses, micro_batch.tasks)


def _reduce(sums: Tensor, counts: Tensor, config: Config, tally) -> tuple[float, dict[str, float], list[float]]:
    message = _sum_over_world(sums, *tally).tolist()
    totals, tally = message[: len(Task)], message[len(Task) :]
    weights = config.training.task_weights
    task_losses = {
        task.name.lower(): total / count for task, total, count in zip(Task, totals, counts.tolist()) if count
    }
    loss = sum(getattr(weights, name) * value for name, value in task_losses.items())
    return loss, task_losses, tally


def _sum_over_world(sums: Tensor, *tally: float) -> Tensor:
    """Sums of the last stages added up over the replicas, and the tally over all ranks, in one all-reduce."""
    speaks = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    message = torch.cat([sums * float(speaks), sums.new_tensor(tally)])
    dist.all_reduce(message)
    return message
