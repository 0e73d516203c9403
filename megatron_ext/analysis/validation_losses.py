"""Validation losses of a checkpoint under roles that it was not trained with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_ext import command_line, config_file, distributed
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.checkpointer import load_weights, read_state
from megatron_ext.config import Config, ParallelConfig
from megatron_ext.data import build_mixture
from megatron_ext.data.composition import Composition
from megatron_ext.errors import UserError
from megatron_ext.routing.plan import with_roles
from megatron_ext.training.config_checks import validate
from megatron_ext.training.image_codes import check_images
from megatron_ext.training.prepare import Preparation
from megatron_ext.training.setup import build_model
from megatron_ext.training.validation import mean_losses
from megatron_ext.transformer.resolved import padded_vocab_size, resolve
from megatron_ext.vocabulary import Vocabulary


def of_checkpoint(
    checkpoint: Path, roles: Mapping[str, Sequence[str]], tensor: int | None = None
) -> dict[str, dict[str, float]]:
    """The losses on the validation data of a checkpoint's run, over the rows that training validates on.

    Args:
        checkpoint: ``.../checkpoints/iter_NNNNNNN``, or a run's folder, for its newest checkpoint.
        roles: name -> overrides ``plan.key=value``; the projections stay those that were trained.
        tensor: tensor-parallel size; None: all processes.

    Returns:
        For each name the metrics that training logs, "validation_loss_understanding" among them.

    Raises:
        UserError: the checkpoint, an override or the data is refused, by name.
    """
    path = checkpoint_folder.of_run(checkpoint)
    trained = config_file.from_tree(Config, read_state(path)["config"])
    trained.parallel = ParallelConfig(tensor=tensor or distributed.world_size(), distributed_optimizer=False)
    if not trained.data.validation:
        raise UserError(f"{path}: its run has no 'data.validation'")
    vocabulary = Vocabulary(trained.data.vocabulary)
    configs = {name: with_roles(trained, overrides) for name, overrides in roles.items()}
    for config in configs.values():
        validate(config, distributed.world_size())
    if not dist.is_initialized():
        distributed.initialize(trained)
    depth = trained.model.image_codes.depth
    data = build_mixture(trained.data.validation, trained.data, vocabulary, train=False, depth=depth)
    check_images(trained, data, "data.validation")
    losses = {}
    for name, config in command_line.progress(configs.items(), desc="roles", leave=False):
        resolved = resolve(config, padded_vocab_size(config, vocabulary))
        chunks = build_model(resolved)
        load_weights(path, chunks, {"fingerprints": {"vocabulary": vocabulary.fingerprint}})
        preparation = Preparation.of(resolved, pad=vocabulary.pad, training=False, image_offset=vocabulary.image_offset)
        composition = Composition(config.training.micro_batch_size, config.micro_batch_multiple, None)
        losses[name] = mean_losses(chunks, config, data, preparation, composition).named("validation_")
    return losses
