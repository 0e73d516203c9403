"""Batches of a run's own data, to analyze its model on."""

import dataclasses

from megatron_ext.config import Config, DataConfig
from megatron_ext.data import build_mixture, step_batches
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.step_loader import StepBatches
from megatron_ext.errors import UserError
from megatron_ext.training.image_codes import check_images
from megatron_ext.vocabulary import Vocabulary


def run_batches(config: Config, vocabulary: Vocabulary, split: str, rows: int, count: int) -> StepBatches:
    """``count`` batches of this replica's share of ``rows`` rows: always the same rows, and no caption dropout.

    Args:
        split: ``validation`` or ``train``.
        rows: the rows of a batch over all replicas.

    Raises:
        UserError: the run has no such split, its data cannot be read, or they are of another VQ tokenizer.
    """
    return step_batches(run_mixture(config, vocabulary, split), plain_loader(config), rows, 0, num_steps=count)


def run_mixture(config: Config, vocabulary: Vocabulary, split: str) -> Mixture:
    """What :func:`run_batches` reads; raises like it. Collective."""
    sources = getattr(config.data, split)
    if not sources:
        raise UserError(f"config: 'data.{split}' is empty; use the other split, or name data")
    mixture = build_mixture(sources, config.data, vocabulary, train=False, depth=config.model.image_codes.depth)
    check_images(config, mixture, f"data.{split}")
    return mixture


def plain_loader(config: Config) -> DataConfig:
    """The run's settings of data, read in this process."""
    return dataclasses.replace(config.data, loader="plain", workers=0)
