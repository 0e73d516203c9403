"""What a plan costs on the run's own data, beside other plans of the same model."""

from dataclasses import dataclass, replace

import numpy as np

from megatron_ext.config import Config, DenseShareConfig, DrawnTablesConfig, ProjectionConfig
from megatron_ext.data.batch import Batch
from megatron_ext.data.build import build_mixture
from megatron_ext.data.packed_rows import PackedRows
from megatron_ext.errors import UserError
from megatron_ext.routing.flops import TRAINING_PER_FORWARD, count, dense, forward_flops
from megatron_ext.routing.plan import Plan
from megatron_ext.token_classes import PADDING_DOCUMENT, Task
from megatron_ext.transformer.resolved import vocab_size
from megatron_ext.vocabulary import Vocabulary

ROWS = 64
"""Packed rows whose tokens are counted."""
PRESETS = {"HiMix": "himix", "HMGen": "hmgen", "HiMix + HMGen": "himix_hmgen_share_all"}
"""The plans to compare with, by name. Their weights do not matter: separate projections cost as much as shared ones."""
ALL = "this mixture"


@dataclass(frozen=True)
class PlanCost:
    """Training FLOPs per token under a plan, by task and under :data:`ALL` for the mixture of the run.

    Attributes:
        current: the plan of the run.
    """

    name: str
    current: bool
    flops: dict[str, float]


def plan_costs(config: Config, plan: Plan, vocabulary: Vocabulary) -> list[PlanCost]:
    """The cost of dense training, of ``plan``, and of :data:`PRESETS`; plans of the same cost only once.

    Returns:
        A plan without reduction first; empty if the data is no longer there or has changed.
    """
    try:
        mixture = build_mixture(config.data.train, config.data, vocabulary, train=True)
    except UserError:
        return []
    batch = PackedRows.of(mixture, config.data).batch(0, ROWS)
    batches = {name: part for name, part in _by_task(batch).items() if (part.document != PADDING_DOCUMENT).any()}
    plans = {"dense": dense(plan), plan.name: plan, **_presets(config)}
    costs: list[PlanCost] = []
    for name, other in plans.items():
        flops = {
            task: _per_token(config, vocab_size(config, vocabulary), other, part) for task, part in batches.items()
        }
        if other is plan:  # replaces dense, if it costs the same
            costs = [cost for cost in costs if cost.flops != flops]
        if flops not in [cost.flops for cost in costs]:
            costs.append(PlanCost(name, other is plan, flops))
    return costs


def _presets(config: Config) -> dict[str, Plan]:
    """The plans of :data:`PRESETS`, in the layers that the run's settings give for them."""
    plain = {
        "table": [],
        "projections": ProjectionConfig(),
        "dense_share": DenseShareConfig(),
        "drawn_tables": DrawnTablesConfig(),
    }
    plans = {name: replace(config.plan, preset=preset, **plain) for name, preset in PRESETS.items()}
    return {name: Plan.of(plan, config.model.num_layers) for name, plan in plans.items()}


def _by_task(batch: Batch) -> dict[str, Batch]:
    """The documents of each task, with those of the others as padding; and all."""
    documents = {task.name.lower(): np.where(batch.task == task, batch.document, PADDING_DOCUMENT) for task in Task}
    return {**{task: replace(batch, document=d) for task, d in documents.items()}, ALL: batch}


def _per_token(config: Config, head_rows: int, plan: Plan, batch: Batch) -> float:
    counts = count(batch, plan)
    return TRAINING_PER_FORWARD * forward_flops(config.model, head_rows, plan, counts) / sum(counts.tokens)
