"""A plan without its savings: every token goes through every layer, and a mask chooses whose hidden state changes.

That is what a plan costs where tokens cannot be left out, with the same kernels. Loss and gradients are those of the
plan as long as no FULL token comes after a SKIP one in its document, since masked tokens still have keys; in the rows
that are timed a caption comes before its image.
"""

import dataclasses

import torch
from megatron.core.utils import unwrap_model

from megatron_ext import distributed
from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.routing.plan import Plan, Role
from megatron_ext.token_classes import Modality, Task
from megatron_ext.transformer.hidden_states import joined
from training_step.ours import OurStep
from training_step.rows import stored_order


class MaskedStep(OurStep):
    """A training step of the dense roles, in which a layer's output counts only for the plan's FULL tokens."""

    def __init__(self, config: Config, vocab_size: int, batch: Batch):
        plan = Plan.of(config.plan, config.model.num_layers)
        projections = dataclasses.replace(config.plan.projections, kind=plan.projections.kind)
        dense = dataclasses.replace(config.plan, preset="dense", projections=projections)
        super().__init__(dataclasses.replace(config, plan=dense), vocab_size, batch)
        rows = batch.rows(0, config.training.micro_batch_size)  # the classes of tokens are those of every micro-batch
        order = stored_order(rows, self.config)
        for layer in unwrap_model(self.chunks[0]).decoder.layers:
            full = _full(plan, layer.layer_number - 1, rows)[order]
            layer.register_forward_hook(_Blend(full.to(distributed.device())), with_kwargs=True)


class _Blend:
    """A forward hook that keeps the input of a layer where its output does not count.

    Args:
        full: bool [T], of the hidden states' rows.
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
