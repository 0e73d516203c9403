"""The training loop: step, validate, evaluate, log, save, stop."""

import dataclasses
import time

import torch
from megatron.core import parallel_state

from megatron_ext import distributed
from megatron_ext.analysis.gradients import alignment
from megatron_ext.callbacks.logging import Logger
from megatron_ext.callbacks.profiling import ProfileWindow
from megatron_ext.config import Config
from megatron_ext.data import step_batches
from megatron_ext.token_classes import Task
from megatron_ext.training.bad_steps import BadSteps
from megatron_ext.training.devices import model_flops_utilisation
from megatron_ext.training.lifecycle import Lifecycle
from megatron_ext.training.prepare import StepInput
from megatron_ext.training.run import Run
from megatron_ext.training.schedule import build_scheduler
from megatron_ext.training.step import StepResult, evaluate_step, evaluation_mode, train_step


def train(run: Run) -> bool:
    """Train to the last iteration, or until a signal or the time limit; save at the end.

    Returns:
        Whether the run is complete.
    """
    config, progress = run.config, run.progress
    bad_steps = BadSteps(config.bad_steps)
    if progress.bad_steps:
        bad_steps.load_state_dict(progress.bad_steps)
    scheduler = build_scheduler(run.optimizer, config.optimizer, config.training.iterations, progress.iteration)
    logger = Logger(config, progress.iteration) if distributed.is_logging_rank() else None
    profile = ProfileWindow(config.logging, config.output, torch.distributed.get_rank())
    lifecycle = Lifecycle(config.lifecycle)
    steps = step_batches(
        run.train_data,
        config.data,
        config.training.global_batch_size,
        progress.iteration,
        num_steps=config.training.iterations,
        prepare=run.preparation(),
    )
    stop, saved, fault = None, progress.iteration, None

    def accept(loss: float, grad_norm: float) -> bool:
        nonlocal fault
        fault = bad_steps.judge(loss, grad_norm)
        return fault is None

    try:
        while progress.iteration < config.training.iterations and stop is None:
            started = time.perf_counter()
            profile.begin(progress.iteration + 1)
            step = next(steps)
            found = {}
            if _due(progress.iteration + 1, config.logging.gradient_alignment_interval, config):
                found["gradient_alignment"] = alignment(run.chunks, step, config)
                started += found["gradient_alignment"]["seconds"]
            result = train_step(
                run.chunks,
                run.optimizer,
                step,
                config,
                accept=accept,
                metrics=(lifecycle.stop_flag(), *_work(step)),
                meanwhile=steps.prefetch,
            )
            vote, flops, dense_flops, tokens = result.metrics
            stop = lifecycle.stop_reason(vote)
            learning_rate = run.optimizer.param_groups[0]["lr"]
            scheduler.step(1)
            progress.iteration += 1
            progress.consumed_samples += config.training.global_batch_size
            progress.consumed_tokens += round(tokens)
            progress.consumed_flops += flops
            progress.consumed_dense_flops += dense_flops
            progress.bad_steps = bad_steps.state_dict()
            record = _record(run, result, time.perf_counter() - started, steps.wait_seconds)
            record |= {"learning_rate": learning_rate, "skipped_steps": bad_steps.total, **found}
            if fault:
                record["skip_reason"] = fault
            if _due(progress.iteration, config.training.validation_interval, config) and run.validation_data:
                record |= validate(run)
            pictures = []
            # A run that was told to stop leaves without: its time may be short.
            if run.benchmarking and stop is None and _due(progress.iteration, config.evaluation.interval, config):
                evaluation = run.benchmarking(progress.iteration)
                record |= evaluation.figures | {"evaluation_seconds": evaluation.seconds}
                pictures = evaluation.pictures
            if logger and (
                _due(progress.iteration, config.logging.interval, config)
                or record.keys() & {"skip_reason", "validation_loss", "evaluation_seconds", "gradient_alignment"}
            ):
                logger.log(record, pictures)
            if trace := profile.end(progress.iteration):
                distributed.report(f"profile written to {trace}")
            bad_steps.enforce_limits(progress.iteration)
            run.checkpoints.poll()
            if config.checkpoint.interval and progress.iteration % config.checkpoint.interval == 0:
                _save(run)
                saved = progress.iteration
        if saved != progress.iteration or run.checkpoints.newest() is None:
            _save(run)
        run.checkpoints.finish()
    finally:
        steps.close()
        lifecycle.close()
        if logger:
            logger.close()
    if stop:
        distributed.report(f"stopped after iteration {progress.iteration}: {stop}; the same command goes on from there")
    return progress.iteration >= config.training.iterations


def validate(run: Run) -> dict[str, float]:
    """Losses over the first ``validation_batches`` global batches of the validation data, always the same rows."""
    config = run.config
    data = dataclasses.replace(config.data, loader="plain", workers=0)
    count = config.training.validation_batches
    prepare = run.preparation(training=False)
    steps = step_batches(
        run.validation_data, data, config.training.global_batch_size, 0, num_steps=count, prepare=prepare
    )
    with evaluation_mode(run.chunks):
        sums, counts = map(sum, zip(*(evaluate_step(run.chunks, step, config) for step in steps)))
    steps.close()
    losses = {
        task.name.lower(): total / tokens for task, total, tokens in zip(Task, sums.tolist(), counts.tolist()) if tokens
    }
    objective = sum(getattr(config.training.task_weights, name) * loss for name, loss in losses.items())
    return {"validation_loss": objective} | {f"validation_loss_{name}": loss for name, loss in losses.items()}


def _save(run: Run) -> None:
    started = time.perf_counter()
    state = {
        "progress": dataclasses.asdict(run.progress),
        "config": dataclasses.asdict(run.config),
        "data": run.train_data.fingerprint,
        **run.identity,
    }
    run.checkpoints.save(run.progress.iteration, run.chunks, run.optimizer, state)
    distributed.report(f"checkpoint of iteration {run.progress.iteration} ({time.perf_counter() - started:.1f} s)")


def _work(step: StepInput) -> tuple[float, float, float]:
    """This rank's share of the step's training FLOPs under the plan and under the dense plan, and of its tokens."""
    shares = parallel_state.get_model_parallel_group().size()
    return step.flops / shares, step.dense_flops / shares, step.tokens / shares


def _record(run: Run, result: StepResult, seconds: float, wait: float) -> dict:
    _, flops, dense_flops, tokens = result.metrics
    devices = torch.distributed.get_world_size()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "iteration": run.progress.iteration,
        "loss": result.loss,
        **{f"loss_{name}": loss for name, loss in result.task_losses.items()},
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
    }


def _due(iteration: int, interval: int, config: Config) -> bool:
    return bool(interval) and (iteration % interval == 0 or iteration == config.training.iterations)
