"""Losses on the validation data."""

import dataclasses

from megatron_ext.config import Config
from megatron_ext.data import Mixture, step_batches
from megatron_ext.data.composition import Composition
from megatron_ext.training.losses import MeanLosses
from megatron_ext.training.prepare import Preparation, own_share
from megatron_ext.training.step import evaluate_step, evaluation_mode


def mean_losses(
    chunks: list, config: Config, data: Mixture, preparation: Preparation, composition: Composition
) -> MeanLosses:
    """Losses over the first ``validation_batches`` global batches of the validation data, always the same rows.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism.
        preparation, composition: those of evaluation; the roles of tokens are the preparation's.
    """
    steps = step_batches(
        data,
        dataclasses.replace(config.data, loader="plain", workers=0),
        config.training.global_batch_size,
        0,
        num_steps=config.training.validation_batches,
        prepare=preparation,
        composition=composition,
        own_share=own_share,
    )
    with evaluation_mode(chunks):
        sums, counts = map(sum, zip(*(evaluate_step(chunks, step, config) for step in steps)))
    steps.close()
    return MeanLosses.of(sums.tolist(), counts.tolist(), config.training)
