"""Classes of tokens that a plan treats alike: what the stored order of a micro-batch is made of."""

from dataclasses import dataclass
from functools import lru_cache

from megatron_ext.routing.plan import Plan, Role, class_index
from megatron_ext.token_classes import Modality, Task


def stored_length(tokens: int, plan: Plan, ranks: int = 1, multiple: int = 1) -> int:
    """T for a micro-batch of ``tokens`` tokens when it must not depend on what they are."""
    step = ranks * multiple
    return (tokens + len(plan_groups(plan).members) * (step - 1)) // step * step


@dataclass(frozen=True)
class Groups:
    """Classes of tokens that a plan treats alike.

    Attributes:
        members: the class indices in each group.
        of_class: the group of each class index.
        components: which weights each group uses; 0 is W.
        roles: for each layer the role of each group.
    """

    members: tuple[tuple[int, ...], ...]
    of_class: tuple[int, ...]
    components: tuple[int, ...]
    roles: tuple[tuple[Role, ...], ...]


@lru_cache
def plan_groups(plan: Plan) -> Groups:
    """The groups of a plan, those that take part most often first, so that few slices hold what a layer needs."""
    alike = {}
    for task in Task:
        for modality in Modality:
            index = class_index(task, modality)
            treatment = tuple(roles[index] for roles in plan.roles), plan.projections.component(task, modality)
            alike.setdefault(treatment, []).append(index)
    treatments = sorted(alike, key=lambda treatment: (sum(treatment[0]), treatment[1]))
    of_class = {index: g for g, treatment in enumerate(treatments) for index in alike[treatment]}
    return Groups(
        members=tuple(tuple(alike[treatment]) for treatment in treatments),
        of_class=tuple(of_class[index] for index in sorted(of_class)),
        components=tuple(component for _, component in treatments),
        roles=tuple(zip(*(roles for roles, _ in treatments))),
    )
