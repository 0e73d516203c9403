"""One training step, and one validation step, over Megatron-Core's pipeline schedules."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from megatron_ext import compat
from megatron_ext.checkpoints.state import single_optimizer
from megatron_ext.config import Config, TaskWeights
from megatron_ext.token_classes import Modality, Task
from megatron_ext.training import watch
from megatron_ext.training.losses import (
    MeanLosses,
    cross_entropy_weights,
    depth_sums,
    global_counts,
    sums_of_tasks,
    task_sums,
)
from megatron_ext.training.prepare import MicroBatch, StepInput, summed_depths
from megatron_ext.training.schedule_timers import ScheduleTimers
from megatron_ext.training.z_loss import cross_entropy_and_square


@dataclass
class StepResult:
    """The result of one step over the global batch, the same on every rank.

    Attributes:
        losses: over the global batch.
        grad_norm: global gradient norm before clipping; nan without a backward pass.
        metrics: the ``metrics`` of all ranks, summed.
        applied: whether the optimizer took the step.
    """

    losses: MeanLosses
    grad_norm: float
    metrics: list[float]
    applied: bool

    @property
    def loss(self) -> float:
        """The objective, without the z-loss."""
        return self.losses.objective


def configure(model_config) -> None:
    """Make Megatron-Core's schedules sum gradients without scaling, since the objective is already normalised, and
    say how far they are."""
    model_config.calculate_per_token_loss = True
    model_config.timers = ScheduleTimers()
    model_config.finalize_model_grads_func = lambda model, num_tokens, **groups: finalize_model_grads(
        model, None, **groups
    )


def train_step(
    chunks: list,
    optimizer,
    step: StepInput,
    config: Config,
    accept: Callable[[float, float], bool] = lambda loss, grad_norm: math.isfinite(loss) and math.isfinite(grad_norm),
    metrics: Sequence[float] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward, backward and optimizer step over the global batch.

    The host first waits for the device after the backward pass is queued.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism.
        step: this replica's rows of the global batch, on the device, the same on all its ranks.
        accept: decides from the loss and the gradient norm whether to apply the step. Every rank passes the same
            numbers and must get the same answer.
        metrics: numbers of this rank to sum over all ranks in the same message (its stop flag, its share of the work).
        meanwhile: work for the host while the device computes the step.
    """
    watch.enter("forward")
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    counts, sums = _run(chunks, step, config, forward_only=False)
    watch.enter("optimizer")
    optimizer.prepare_grads()
    watch.enter("prefetch")
    meanwhile()
    watch.enter("optimizer")
    losses, metrics = _reduce(sums, counts, config, metrics)
    grad_norm = _gradient_norm(optimizer)
    applied = accept(losses.objective, grad_norm)
    if applied:
        if 0 < config.optimizer.clip_grad < grad_norm:
            limit = config.optimizer.clip_grad
            torch.nn.utils.clip_grads_with_norm_(optimizer.get_parameters(), limit, torch.tensor(grad_norm))
        optimizer.step_with_ready_grads()
    return StepResult(losses, grad_norm, metrics, applied)


@contextmanager
def evaluation_mode(chunks: list) -> Iterator[None]:
    """Put the model in evaluation mode, and back in training mode afterwards."""
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.train()


@torch.no_grad()
def evaluate_step(chunks: list, step: StepInput, config: Config) -> tuple[Tensor, Tensor]:
    """Forward pass over the global batch; ``step``: this replica's rows of it, on the device.

    Returns:
        Sums of losses over the global batch, and counts [tasks + 1] of loss tokens, float64, the same on every rank;
        the arguments of :meth:`~megatron_ext.training.losses.MeanLosses.of`.
    """
    counts, sums = _run(chunks, step, config, forward_only=True)
    return _sum_over_world(sums), counts


def task_gradients(chunks: list, step: StepInput, config: Config, task: Task) -> None:
    """Forward and backward pass for one task's mean cross-entropy over the global batch, or for its part of the
    objective where means are by modality; without a z-loss.

    Afterwards ``main_grad`` of every parameter (this rank's slice of it) is its gradient, complete on every replica,
    even if the optimizer is sharded over replicas. Nothing else has changed: the next step zeroes these buffers.
    """
    task_weights = TaskWeights(**{other.name.lower(): float(other == task) for other in Task})
    training = dataclasses.replace(config.training, task_weights=task_weights, z_loss=0.0)
    config = dataclasses.replace(config, training=training)
    _forget_gradients(chunks)
    for chunk in chunks:
        chunk.force_all_reduce = True  # for gradients that are reduced as they become ready
    try:
        _run(chunks, step, config, forward_only=False, force_all_reduce=True)
    finally:
        for chunk in chunks:
            chunk.force_all_reduce = False


def local_gradients(chunks: list, step: StepInput, config: Config) -> None:
    """Forward and backward pass whose gradients stay where they are computed: ``main_grad`` of every parameter is that
    of this rank's own passes, and is not reduced over any ranks."""
    _forget_gradients(chunks)
    schedule = get_model_config(chunks[0])
    before = schedule.finalize_model_grads_func, schedule.no_sync_func
    schedule.finalize_model_grads_func = schedule.no_sync_func = None
    try:
        with ExitStack() as without_reduction:
            for chunk in chunks:
                without_reduction.enter_context(chunk.no_sync())
            _run(chunks, step, config, forward_only=False)
    finally:
        schedule.finalize_model_grads_func, schedule.no_sync_func = before


def _forget_gradients(chunks: list) -> None:
    for chunk in chunks:
        chunk.zero_grad_buffer()
        # The optimizer's last step may have left the buffers in .grad too; gradients would be added to them twice.
        chunk.zero_grad(set_to_none=True)


def _run(chunks: list, step: StepInput, config: Config, forward_only: bool, **options) -> tuple[Tensor, Tensor]:
    """Loss tokens [tasks + 1] of the global batch, and the sums of their losses on this rank."""
    counts = global_counts(step.loss_tokens)
    weights = cross_entropy_weights(counts, config.training)
    sums = counts.new_zeros(sums_of_tasks(config.training) * len(Task) + summed_depths(config))
    for result in get_forward_backward_func()(
        forward_step_func=partial(_forward, weights, config),
        data_iterator=[iter(step.micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(step.micro_batches),
        # The schedule itself divides this length over the ranks of sequence parallelism.
        seq_length=step.stored_length,
        micro_batch_size=1,
        forward_only=forward_only,
        **options,
    ):
        sums += result
    return counts, sums


def _forward(weights: Tensor, config: Config, micro_batches: Iterator[MicroBatch], chunk) -> tuple[Tensor, Callable]:
    micro_batch = next(micro_batches)
    token_losses = get_attr_wrapped_model(chunk, "token_losses")
    return chunk(micro_batch.route), partial(_loss, micro_batch, weights, config, token_losses)


def _loss(
    micro_batch: MicroBatch,
    weights: Tensor,
    config: Config,
    token_losses: Callable,
    output: Tensor | tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """This micro-batch's share of the objective. The schedule calls it on the last stage only."""
    labels, tasks, modalities = micro_batch.labels, micro_batch.tasks, micro_batch.modalities
    if modalities is None:
        modalities = int(Modality.TEXT)  # whose weights are those of all
    logits, code_losses = output if isinstance(output, tuple) else (output, None)
    if z_loss := config.training.z_loss:  # not with several codes an image token
        losses, squares = terms = cross_entropy_and_square(logits, labels)
        losses = losses + z_loss * squares
    else:
        losses = token_losses(logits, labels)
        if code_losses is not None:
            losses = torch.cat([losses, code_losses.mean(1)])
        terms = [losses]
    objective = (losses * weights[modalities, tasks]).sum()
    sums = [task_sums(term, tasks) for term in terms]
    if summed_depths(config):
        code_losses = losses[:, None] if code_losses is None else code_losses
        sums.append(depth_sums(code_losses, modalities[len(losses) - len(code_losses) :]))
    return objective, torch.zeros((), dtype=torch.int, device=objective.device), torch.cat(sums)


def _reduce(sums: Tensor, counts: Tensor, config: Config, metrics) -> tuple[MeanLosses, list[float]]:
    message = torch.cat([counts, _sum_over_world(sums, *metrics)]).tolist()  # one wait for the device
    start, stop = len(counts), len(counts) + len(sums)
    return MeanLosses.of(message[start:stop], message[:start], config.training), message[stop:]


def _gradient_norm(optimizer) -> float:
    """Norm of the gradients of the whole model. Megatron-Core's own function waits for the device once per parameter if
    neither Transformer Engine nor Apex is installed."""
    single = single_optimizer(optimizer)
    gradients = compat.gradients_for_norm(single)
    square = torch.zeros((), device=torch.cuda.current_device())
    if gradients:
        square += torch.nn.utils.get_total_norm(gradients).square()
    dist.all_reduce(square, group=single.get_grad_stats_parallel_group())
    return float(square.sqrt())


def _sum_over_world(sums: Tensor, *metrics: float) -> Tensor:
    """Sums of the last stages added over the replicas, and metrics over all ranks, in one all-reduce."""
    is_reporting_rank = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    message = torch.cat([sums * float(is_reporting_rank), sums.new_tensor(metrics)])
    dist.all_reduce(message)
    return message
