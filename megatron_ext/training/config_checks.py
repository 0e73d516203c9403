"""Refuse a run that cannot be trained, before anything is built.

Each section is checked beside what it configures; here are the checks of the training section and the optimizer, and
the order of them all.
"""

import math
import os

from megatron_ext.config import Config, TaskWeights
from megatron_ext.data.config_checks import validate_data
from megatron_ext.errors import UserError, check_at_least_one
from megatron_ext.routing.plan import validate_plan
from megatron_ext.run_config import LONGER, CheckpointConfig, LifecycleConfig
from megatron_ext.transformer.config_checks import (
    validate_image_codes,
    validate_implementation,
    validate_layout,
    validate_model,
)

_FROM_ZERO = (
    ("logging", "straggler_interval"),
    ("lifecycle", "hang_minutes"),
    ("lifecycle", "replica_check_interval"),
)


def validate(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot run on ``world_size`` processes.

    The evaluation section has a check of its own, :func:`megatron_ext.evaluation.config_checks.validate_evaluation`.

    Raises:
        UserError: names the key, its value and what would do.
    """
    validate_model(config)
    validate_image_codes(config)
    plan = validate_plan(config.plan, config.model.num_layers, config.parallel.tensor)
    validate_implementation(config)
    if config.training.fp8 != "none":
        from megatron_ext.transformer import fp8  # Imported late: it loads torch, which other checks do not need.

        fp8.validate(config, plan)
    validate_layout(config, world_size)
    _validate_training(config)
    validate_data(config.data)
    _validate_optimizer(config)
    _validate_checkpoints(config.checkpoint)
    check_at_least_one("logging", config.logging, "interval")
    for section, key in _FROM_ZERO:
        value = getattr(getattr(config, section), key)
        if not 0 <= value < math.inf:  # also refuses NaN
            raise UserError(f"config: '{section}.{key}' is {value}, must be a number from 0")
    _validate_timeout(config.lifecycle)


def _validate_training(config: Config) -> None:
    training = config.training
    counts = ("iterations", "micro_batch_size", "global_batch_size", "row_multiple")
    check_at_least_one("training", training, *counts)
    if training.z_loss < 0:
        raise UserError(f"config: 'training.z_loss' is {training.z_loss}, must be at least 0")
    if training.z_loss and (config.model.image_codes.depth > 1 or training.means == "modality"):
        raise UserError(
            f"config: 'training.z_loss' is {training.z_loss}, which needs one code an image token "
            "(model.image_codes.depth=1) and training.means=task"
        )
    if training.means == "modality" and training.task_weights != TaskWeights():
        raise UserError(
            "config: 'training.task_weights' weighs the means of training.means=task; means by modality have none"
        )


def _validate_optimizer(config: Config) -> None:
    optimizer, iterations = config.optimizer, config.training.iterations
    for number, group in enumerate(optimizer.groups):
        if not 0 <= group.lr_multiplier < math.inf:  # also refuses NaN
            raise UserError(
                f"config: 'optimizer.groups[{number}].lr_multiplier' is {group.lr_multiplier}, must be a number from 0"
            )
    if optimizer.schedule == "wsd" and not 0 < optimizer.wsd_decay_iterations <= iterations:
        raise UserError(
            f"config: 'optimizer.wsd_decay_iterations' is {optimizer.wsd_decay_iterations}, "
            f"must lie in 1 .. training.iterations ({iterations})"
        )
    if optimizer.warmup_iterations >= iterations:
        raise UserError(
            f"config: 'optimizer.warmup_iterations' is {optimizer.warmup_iterations}, "
            f"must be less than training.iterations ({iterations})"
        )


def _validate_timeout(lifecycle: LifecycleConfig) -> None:
    timeout, longest = lifecycle.distributed_timeout_minutes, LONGER * lifecycle.hang_minutes
    if not longest < timeout < math.inf:  # also refuses NaN
        raise UserError(
            f"config: 'lifecycle.distributed_timeout_minutes' is {timeout:g}, must be over {longest:g} "
            f"({LONGER} x lifecycle.hang_minutes, the longest that a rank may stay where it is)"
        )


def _validate_checkpoints(checkpoint: CheckpointConfig) -> None:
    for key in ("interval", "keep", "local_interval"):
        if (value := getattr(checkpoint, key)) < 0:
            raise UserError(f"config: 'checkpoint.{key}' is {value}, must be at least 0")
    if bool(checkpoint.local) != bool(checkpoint.local_interval):
        raise UserError(
            f"config: 'checkpoint.local' is {checkpoint.local!r} and 'checkpoint.local_interval' is "
            f"{checkpoint.local_interval}; local checkpoints need both"
        )
    if "$" in os.path.expandvars(checkpoint.local):
        raise UserError(f"config: 'checkpoint.local' is {checkpoint.local!r}, names a variable that is not set")
