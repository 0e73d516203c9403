"""A plan without its savings: every token goes through every layer, and a mask chooses which hidden states change.

This is the cost of a plan where a layer cannot leave tokens out, with the same kernels. Masked tokens still have keys,
so loss and gradients are those of the plan only if no FULL token follows a SKIP token in its document. In the timed
rows a caption comes before its image.
"""

import dataclasses

import torch
from megatron.core.utils import unwrap_model

from megatron_ext import distributed
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role
from megatron_ext.token_classes import Modality, Task
from megatron_ext.transformer.hidden_states import joined
from training_step.ours import OurStep
from training_step.random_rows import stored_order


class MaskedStep(OurStep):
    """A training step with dense roles in which a layer changes only the FULL tokens of the plan."""

    def __init__(self, config: Config, vocab_size: int, batch: Batch):
        plan = Plan.from_config(config)
        projections = dataclasses.replace(config.plan.projections, kind=plan.projections.kind)
        dense = dataclasses.replace(config.plan, preset="dense", projections=projections)
        super().__init__(dataclasses.replace(config, plan=dense), vocab_size, batch)
        rows = batch.rows(0, config.training.micro_batch_size)  # all micro-batches have the same classes of tokens
        order = stored_order(rows, self.config)
        for layer in unwrap_model(self.chunks[0]).decoder.layers:
            full = _full(plan, layer.layer_number - 1, rows)[order]
            layer.register_forward_hook(_Blend(full.to(distributed.device())), with_kwargs=True)


class _Blend:
    """A forward hook that keeps the input of a layer for tokens that are not FULL.

    Args:
        full: bool [T], in stored order.
    """

    def __init__(self, full: torch.Tensor):
        self._full = full[:, None, None]

    def __call__(self, layer, arguments, keywords, output):
        hidden_states, context = output
        return torch.where(self._full, joined(hidden_states), joined(keywords["hidden_states"])), context


def _full(plan: Plan, layer: int, batch: Batch) -> torch.Tensor:
    """Which tokens of rows [b, s] are FULL in a layer, bool [b * s]."""
    full = torch.zeros(batch.shape, dtype=torch.bool)
    for task in Task:
        for modality in Modality:
            of_class = (batch.task == task) & (batch.modality == modality)
            full |= of_class & (plan.role(layer, task, modality) == Role.FULL)
    return full.flatten()
