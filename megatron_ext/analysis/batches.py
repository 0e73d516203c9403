"""Rows of a run's own data, to look at a model with."""

import dataclasses

from megatron_ext.config import Config
from megatron_ext.data import build_mixture, step_batches
from megatron_ext.data.step_loader import StepBatches
from megatron_ext.errors import UserError
from megatron_ext.vocabulary import Vocabulary


def run_batches(config: Config, vocabulary: Vocabulary, split: str, rows: int, count: int) -> StepBatches:
    """``count`` batches of this replica's share of ``rows`` rows: always the same ones, with every caption.

    Args:
        split: ``validation`` or ``train``, which of the run's data.
        rows: of all replicas together.

    Raises:
        UserError: the run names no such data, or they cannot be read.
    """
    sources = getattr(config.data, split)
    if not sources:
        raise UserError(f"config: 'data.{split}' is empty; look at the other data, or name some")
    mixture = build_mixture(sources, config.data, vocabulary, train=False)
    plain = dataclasses.replace(config.data, loader="plain", workers=0)
    return step_batches(mixture, plain, rows, 0, num_steps=count)
