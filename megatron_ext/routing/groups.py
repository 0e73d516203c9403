"""Groups of token classes that a plan treats alike, which form the stored order of a micro-batch."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_ext.data.batch import Batch
from megatron_ext.routing.dense_share import Selection
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role, class_index, task_and_modality
from megatron_ext.token_classes import Modality, Task


def stored_length(tokens: int, plan: Plan, ranks: int = 1, multiple: int = 1) -> int:
    """T for a micro-batch of ``tokens`` tokens where it must not depend on their classes."""
    step = ranks * multiple
    return (tokens + len(plan_groups(plan).members) * (step - 1)) // step * step


def token_classes(batch: Batch, plan: Plan, selection: Selection | None) -> np.ndarray:
    """Class of each token of a batch of arrays, int64 [b, s]: its index in each of ``plan.roles``.

    Args:
        selection: the step's selection, :meth:`~megatron_ext.routing.plan.Plan.selection`; None: that of evaluation.
    """
    classes = class_index(batch.task.astype(np.int64), batch.modality)
    return classes + len(Task) * len(Modality) * plan.table_numbers(batch, selection)


@dataclass(frozen=True)
class Groups:
    """Classes of tokens that a plan treats alike.

    Attributes:
        members: the class indices in each group.
        of_class: the group of each class index.
        components: the weights that each group uses; 0 is W.
        roles: for each layer, the role of each group.
    """

    members: tuple[tuple[int, ...], ...]
    of_class: tuple[int, ...]
    components: tuple[int, ...]
    roles: tuple[tuple[Role, ...], ...]


@lru_cache
def plan_groups(plan: Plan) -> Groups:
    """The groups of a plan, those that take part in most layers first, so that a layer needs few slices."""
    alike = {}
    for index, roles in enumerate(zip(*plan.roles)):
        alike.setdefault((roles, plan.projections.component(*task_and_modality(index))), []).append(index)
    treatments = sorted(alike, key=lambda treatment: (sum(treatment[0]), treatment[1]))
    of_class = {index: g for g, treatment in enumerate(treatments) for index in alike[treatment]}
    return Groups(
        members=tuple(tuple(alike[treatment]) for treatment in treatments),
        of_class=tuple(of_class[index] for index in sorted(of_class)),
        components=tuple(component for _, component in treatments),
        roles=tuple(zip(*(roles for roles, _ in treatments))),
    )
