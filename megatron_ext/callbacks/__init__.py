"""What happens around a training step, as callbacks (:mod:`megatron_ext.training.callback`), one file each."""

import importlib

import torch.distributed as dist

from megatron_ext.callbacks.bad_step_limits import BadStepLimits
from megatron_ext.callbacks.benchmarks import Benchmarking
from megatron_ext.callbacks.checkpointing import Checkpointing, CheckpointSeconds
from megatron_ext.callbacks.gradient_alignment import GradientAlignment
from megatron_ext.callbacks.logging import Logging
from megatron_ext.callbacks.profiling import Profiling
from megatron_ext.callbacks.replica_check import ReplicaCheck
from megatron_ext.callbacks.stragglers import Stragglers
from megatron_ext.callbacks.validation import Validation
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.evaluation.config_checks import validate_evaluation
from megatron_ext.training.callback import Callback
from megatron_ext.training.run import Run


def build_callbacks(run: Run) -> list[Callback]:
    """The callbacks of a run, in order. After each step:

    1. what adds to the step's record: the time that checkpoints took, the comparison of the ranks' speeds, gradient
       alignment, validation, benchmarks, then the callbacks named in ``callbacks`` of the configuration, which see all
       of the numbers;
    2. logging, which writes the record;
    3. profiling, whose trace covers all of the above;
    4. the limits on bad steps and the check of replicas, once the last step is logged and before a checkpoint is saved;
    5. checkpointing.

    The list is the same on every rank.

    Raises:
        UserError: a benchmark's file or the VQ tokenizer is missing, malformed, or has another vocabulary.
    """
    config = run.config
    checkpointing = Checkpointing()
    callbacks: list[Callback] = []
    if config.checkpoint.interval or config.checkpoint.local_interval:
        callbacks.append(CheckpointSeconds(checkpointing))
    if config.logging.straggler_interval and dist.get_world_size() > 1:
        callbacks.append(Stragglers())
    if config.logging.gradient_alignment_interval:
        callbacks.append(GradientAlignment(config.logging.gradient_alignment_interval))
    callbacks.append(Validation())
    if config.evaluation.interval:
        callbacks.append(Benchmarking(run))
    callbacks += [callback() for callback in named_callbacks(config)]
    callbacks += [Logging(config), Profiling(config.logging, config.output, dist.get_rank())]
    callbacks.append(BadStepLimits())
    if config.lifecycle.replica_check_interval:
        callbacks.append(ReplicaCheck())
    callbacks.append(checkpointing)
    return callbacks


def validate_callbacks(config: Config) -> None:
    """Refuse callbacks that cannot be built, before the process group starts.

    Raises:
        UserError: names the key, its value and what would do.
    """
    validate_evaluation(config)
    named_callbacks(config)


def named_callbacks(config: Config) -> list[type[Callback]]:
    """The classes that ``callbacks`` of the configuration names.

    Raises:
        UserError: a name is not "module:Class" or names no callback.
    """
    return [_named(name, f"callbacks[{i}]") for i, name in enumerate(config.callbacks)]


def _named(name: str, key: str) -> type[Callback]:
    module_name, _, class_name = name.partition(":")
    if not (module_name and class_name):
        raise UserError(f"config: '{key}' is {name!r}, must be module:Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"config: '{key}' is {name!r}, which cannot be imported: {error}") from None
    callback = getattr(module, class_name, None)
    if callback is None:
        raise UserError(f"config: '{key}' is {name!r}, but {module.__file__} has no {class_name}")
    if not (isinstance(callback, type) and issubclass(callback, Callback)):
        raise UserError(f"config: '{key}' is {name!r}, which is no subclass of megatron_ext.training.callback.Callback")
    return callback
