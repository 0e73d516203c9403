"""The training loop: fetch a batch, take a step, tell the callbacks."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing

import torch

from megatron_ext import distributed
from megatron_ext.data import step_batches
from megatron_ext.training import watch
from megatron_ext.training.callback import Callback, CallbackList, StepRecord
from megatron_ext.training.devices import model_flops_utilisation
from megatron_ext.training.lifecycle import Lifecycle, told_already
from megatron_ext.training.non_finite import is_non_finite, locate
from megatron_ext.training.prepare import StepInput, own_share
from megatron_ext.training.run import Run
from megatron_ext.training.schedule import build_scheduler
from megatron_ext.training.step import StepResult, train_step


def train(run: Run, callbacks: Sequence[Callback]) -> bool:
    """Train to the last iteration, or until a signal or a time limit.

    Args:
        callbacks: called around every step, in this order (:func:`megatron_ext.callbacks.build_callbacks`); without
            one that saves checkpoints none is saved.

    Returns:
        Whether the run is complete.
    """
    config, progress = run.config, run.progress
    scheduler = build_scheduler(run.optimizer, config.optimizer, config.training.iterations, progress.iteration)
    hooks = CallbackList(callbacks)
    with ExitStack() as resources:  # closed in reverse order
        resources.enter_context(closing(hooks))
        hooks.on_train_begin(run)
        lifecycle = resources.enter_context(closing(Lifecycle(config.lifecycle)))
        stop_reason = told_already(lifecycle)
        started_at = progress.iteration
        steps = resources.enter_context(closing(_steps(run)))
        while progress.iteration < config.training.iterations and stop_reason is None:
            hooks.before_batch(run)
            watch.at(progress.iteration + 1, "data")
            fetch_started = time.perf_counter()
            step = next(steps)
            seconds = time.perf_counter() - fetch_started
            watch.enter("before_step")
            hooks.before_step(run, step)
            step_started = time.perf_counter()
            result = train_step(
                run.chunks,
                run.optimizer,
                step,
                config,
                accept=run.bad_steps.accept,
                metrics=(lifecycle.stop_flag(), *_work(step)),
                meanwhile=steps.prefetch,
            )
            stop_flags, *work = result.metrics
            stop_reason = lifecycle.stop_reason(stop_flags)
            learning_rate = scheduler.get_lr({})  # that of parameters without a group
            scheduler.step(1)
            progress.advance(config.training.global_batch_size, *work[:3])
            progress.bad_steps = run.bad_steps.state_dict()
            seconds += time.perf_counter() - step_started
            record = _record(run, result, learning_rate, seconds, steps.wait_seconds, stop_reason)
            if run.bad_steps.consecutive == 1 and is_non_finite(result.loss, result.grad_norm):
                record.metrics["non_finite"] = locate(run.chunks, step, config)
            watch.enter("callbacks")
            hooks.after_step(run, record)
        watch.enter("end")
        if not stop_reason or progress.iteration > started_at:  # otherwise there is nothing new to save
            hooks.on_train_end(run)
    if stop_reason:
        distributed.report(f"stopped after iteration {progress.iteration}: {stop_reason}; the same command resumes it")
    return progress.iteration >= config.training.iterations


def _steps(run: Run):
    """The inputs of the steps that are left, in order."""
    return step_batches(
        run.train_data,
        run.config.data,
        run.config.training.global_batch_size,
        run.progress.iteration,
        num_steps=run.config.training.iterations,
        prepare=run.preparation(),
        composition=run.composition(),
        own_share=own_share,
    )


def _work(step: StepInput) -> list[float]:
    """This rank's share of the step's training FLOPs under the plan and under the dense plan and of its tokens; with
    several codes an image token also of the FLOPs of the layers alone, under both plans."""
    shares = distributed.replica_group().size()
    return [amount / shares for amount in (step.flops, step.dense_flops, step.tokens, *step.stack_flops)]


def _record(
    run: Run, result: StepResult, learning_rate: float, seconds: float, wait: float, stop_reason: str | None
) -> StepRecord:
    _, flops, dense_flops, tokens, *stack = result.metrics
    devices = torch.distributed.get_world_size()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    metrics = {
        "iteration": run.progress.iteration,
        **result.losses.named(),
        "grad_norm": result.grad_norm,
        "consumed_samples": run.progress.consumed_samples,
        "consumed_tokens": run.progress.consumed_tokens,
        "consumed_flops": run.progress.consumed_flops,
        "consumed_dense_flops": run.progress.consumed_dense_flops,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "data_wait_seconds": wait,
        "flops": flops,
        "flops_ratio": flops / dense_flops,
        "mfu": model_flops_utilisation(flops, seconds, devices, device),
        "learning_rate": learning_rate,
        "skipped_steps": run.bad_steps.total,
    }
    if stack:  # the depth head, which no plan shortens, hides what a plan saves
        metrics["stack_flops_ratio"] = stack[0] / stack[1]
    reason = run.bad_steps.reason
    if reason:
        metrics["skip_reason"] = reason
    return StepRecord(metrics, log_now=reason is not None, stop_reason=stop_reason)
