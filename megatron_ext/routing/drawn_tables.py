"""Roles drawn per document: in training every document takes one of a number of random role tables.

A model trained so has met tables of every cost, and can be evaluated under any of them: the search for roles
(:mod:`megatron_ext.role_search`) measures what a role in a layer costs in loss without training a model for each table.

As for a dense share, the choice is a function of integers, the iteration and the document's tokens. So every rank,
stage and layout chooses the same, however the batch is split. Without an iteration, in evaluation and generation, every
document takes the plan's own table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.config import DrawnTablesConfig, RoleChoice
from megatron_ext.data import counter_random
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError, check_at_least_one
from megatron_ext.routing.dense_share import Selection, document_numbers
from megatron_ext.routing.roles import Role, class_index, class_indices, layer_numbers
from megatron_ext.token_classes import Modality, Task

Table = tuple[tuple[Role, ...], ...]
"""For each layer, the role of each class of token at :func:`~megatron_ext.routing.roles.class_index`."""

Choices = Mapping[tuple[int, int], tuple[Role, ...]]
"""(layer, class index) -> the roles that a table may give there instead of its own."""

_UNDERSTANDING_IMAGE = class_index(Task.UNDERSTANDING, Modality.IMAGE)
_EVERY_LAYER = {_UNDERSTANDING_IMAGE: (Role.KV_ONLY, Role.SKIP)}
_BEFORE_THE_LAST = {
    class_index(Task.GENERATION, Modality.IMAGE): (Role.SKIP,),
    class_index(Task.GENERATION, Modality.TEXT): (Role.KV_ONLY,),
}
_SHARE, _CHANGE, _ROLE = 1, 2, 3  # purposes of random numbers


@dataclass(frozen=True)
class DrawnTables:
    """``count`` random tables, of which a document draws one; with probability ``own`` it keeps the plan's own."""

    count: int
    own: float

    def selection(self, iteration: int) -> Selection:
        """The selection in an iteration of training, counted from 0."""
        return Selection(self.own, iteration + 1)

    def numbers(self, batch: Batch, selection: Selection | None) -> np.ndarray:
        """The table of each token of rows on the host, int64 [b, s]: 0 for the plan's own, 1 .. count for those drawn;
        ``selection`` None: the plan's own."""
        if selection is None:
            return np.zeros(batch.shape, dtype=np.int64)
        drawn = (document_numbers(batch.arrays(), selection.number) - selection.share) / (1 - selection.share)
        return np.minimum(1 + np.floor(drawn * self.count).astype(np.int64), self.count).clip(min=0) * (drawn >= 0)

    def describe(self) -> str:
        """Describe the tables in one line."""
        return (
            f"in training documents draw one of {self.count} random tables, or this one with probability {self.own:g}"
        )


def drawn_tables(config: DrawnTablesConfig, own: Table) -> tuple[DrawnTables | None, list[Table]]:
    """What ``plan.drawn_tables`` describes, and its tables, for a plan with the table ``own``.

    Raises:
        UserError: names a key, its value and what would do.
    """
    if not config.count:
        return None, []
    check_at_least_one("plan.drawn_tables", config, "count")
    if not 0 <= config.own < 1:
        raise UserError(f"config: 'plan.drawn_tables.own' is {config.own:g}, must lie in 0 .. 1, without 1")
    choices = role_choices(config.choices, own, "plan.drawn_tables.choices")
    if not choices:
        raise UserError("config: 'plan.drawn_tables.choices' allow no role but those of the plan")
    tables = [random_table(own, choices, config.seed, number) for number in range(config.count)]
    return DrawnTables(config.count, config.own), tables


def role_choices(entries: Sequence[RoleChoice], own: Table, key: str) -> Choices:
    """The roles that ``entries`` allow instead of those of ``own``.

    Without entries: understanding's image tokens may be KV_ONLY or SKIP in every layer, generation's may be SKIP and
    its text KV_ONLY in every layer but the last. (Generated images that are KV_ONLY give the loss of SKIP at a higher
    cost: only text after them would see their keys. In the last layer all but understanding's image tokens predict:
    ``<boi>``, which predicts the first code, is text.) Entries may allow whatever ``plan.table`` may.

    Args:
        key: the entries' key, for errors.

    Raises:
        UserError: an entry names no layer of the model.
    """
    allowed: dict[tuple[int, int], list[Role]] = {}
    for layer in range(len(own)) if not entries else ():
        for index, roles in (_EVERY_LAYER | (_BEFORE_THE_LAST if layer < len(own) - 1 else {})).items():
            allowed[layer, index] = list(roles)
    for number, entry in enumerate(entries):
        roles = [Role[role.upper()] for role in entry.roles]
        for layer in layer_numbers(str(entry.layers), f"{key}[{number}].layers", len(own)):
            for index in class_indices(entry.task, entry.modality):
                allowed.setdefault((layer, index), []).extend(roles)
    choices = {}
    for (layer, index), roles in sorted(allowed.items()):
        if others := tuple(dict.fromkeys(role for role in roles if role != own[layer][index])):
            choices[layer, index] = others
    return choices


def random_table(own: Table, choices: Choices, seed: int, number: int) -> Table:
    """The ``number``-th random table: each choice is taken with a probability that is itself random, the same for the
    whole table, so that tables of every cost occur."""
    table, share = [list(roles) for roles in own], counter_random.uniform(_SHARE, seed, number)
    layers, indices = (np.array(values) for values in zip(*choices))
    taken = counter_random.uniform(_CHANGE, seed, number, layers, indices) < share
    picked = counter_random.uniform(_ROLE, seed, number, layers, indices)
    for (layer, index), roles, take, pick in zip(choices, choices.values(), taken, picked):
        if take:
            table[layer][index] = roles[int(pick * len(roles))]
    return tuple(map(tuple, table))
