"""A trained checkpoint, ready to generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_ext import config_file
from megatron_ext.config import Config
from megatron_ext.routing.plan import Plan, with_roles
from megatron_ext.training.config_checks import validate
from megatron_ext.transformer.resolved import ResolvedConfig, padded_vocab_size, resolve
from megatron_ext.vocabulary import Vocabulary

if TYPE_CHECKING:
    from megatron_ext.transformer.model import UnifiedModel


@dataclass
class TrainedModel:
    """A model with the configuration and vocabulary of its training.

    Attributes:
        chunks: this rank's part of the model.
    """

    resolved: ResolvedConfig
    vocabulary: Vocabulary
    chunks: list[UnifiedModel]

    @property
    def model(self) -> UnifiedModel:
        """The whole model, without pipeline stages."""
        (model,) = self.chunks
        return model

    @property
    def config(self) -> Config:
        """The configuration of its training, with overrides."""
        return self.resolved.config

    @property
    def plan(self) -> Plan:
        """The roles of tokens and the weights that image tokens use."""
        return self.resolved.plan


def load(
    checkpoint: Path, overrides: list[str], vocabulary: Path | None = None, tensor: int | None = None
) -> TrainedModel:
    """Load a checkpoint's model, with tensor parallelism over ``tensor`` processes (None: all processes).

    Args:
        checkpoint: ``.../checkpoints/iter_NNNNNNN``, or a run's folder, for its newest checkpoint; trained under any
            parallel layout.
        overrides: ``section.key=value``; ``plan.*`` changes the roles of tokens, not the projections.
        vocabulary: its folder; None: that of the run's configuration.

    Raises:
        UserError: the checkpoint or the vocabulary is missing or damaged, or the vocabulary is not that of training.
    """
    from megatron_ext import distributed
    from megatron_ext.checkpoints import folder as checkpoint_folder
    from megatron_ext.checkpoints.checkpointer import load_weights, read_state
    from megatron_ext.transformer.model import build_chunks

    path = checkpoint_folder.of_run(checkpoint)
    state = read_state(path)
    config = with_roles(config_file.from_tree(Config, state["config"]), overrides)
    config.parallel = type(config.parallel)(tensor=tensor or distributed.world_size())
    config.training.micro_batch_size, config.training.global_batch_size = 1, distributed.world_size()
    config.training.recompute = "none"
    validate(config, distributed.world_size())
    trained_vocabulary = Vocabulary(vocabulary or config.data.vocabulary)
    if not dist.is_initialized():
        distributed.initialize(config)
    resolved = resolve(config, padded_vocab_size(config, trained_vocabulary))
    (model,) = build_chunks(resolved)
    load_weights(path, [model], {"fingerprints": {"vocabulary": trained_vocabulary.fingerprint}})
    return TrainedModel(resolved, trained_vocabulary, [model.eval()])
