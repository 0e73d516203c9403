"""A trained checkpoint, ready to generate."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.routing.plan import Plan, with_roles
from megatron_ext.vocabulary import Vocabulary


@dataclass
class Trained:
    """A model with what it was trained under."""

    config: Config
    plan: Plan
    vocabulary: Vocabulary
    model: torch.nn.Module


def load(checkpoint: Path, overrides: list[str], vocabulary: Path | None = None, tensor: int | None = None) -> Trained:
    """The model of a checkpoint, cut by tensor parallelism over ``tensor`` processes (None: all of this run).

    Args:
        checkpoint: ``.../checkpoints/iter_NNNNNNN``, or a run's folder, whose newest checkpoint is taken; trained under
            any layout.
        overrides: ``section.key=value``; ``plan.*`` changes the roles that the model is used with, and leaves the
            projections that were trained.
        vocabulary: its folder, where it is not that of the run's configuration any more.

    Raises:
        UserError: the checkpoint or the vocabulary is missing, damaged, or another one than it was trained with.
    """
    from megatron_ext import distributed
    from megatron_ext.checkpoints import folder as checkpoint_folder
    from megatron_ext.checkpoints.checkpointer import load_weights, read_state
    from megatron_ext.training.run import padded_vocabulary
    from megatron_ext.training.validation import validate
    from megatron_ext.transformer.model import build_chunks

    path = checkpoint_folder.of_run(checkpoint)
    state = read_state(path)
    config = with_roles(config_file.from_tree(Config, state["config"]), overrides)
    config.parallel = type(config.parallel)(tensor=tensor or distributed.world_size())
    config.training.micro_batch_size, config.training.global_batch_size = 1, distributed.world_size()
    config.training.recompute = "none"
    validate(config, distributed.world_size())
    words = Vocabulary(vocabulary or config.data.vocabulary)
    if not dist.is_initialized():
        distributed.initialize(config)
    (model,) = build_chunks(config, padded_vocabulary(config, words))
    load_weights(path, [model], {"fingerprints": {"vocabulary": words.fingerprint}})
    return Trained(config, Plan.of(config.plan, config.model.num_layers), words, model.eval())
