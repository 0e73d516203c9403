"""The tables of a search: what may change, and how a table is written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_ext import config_file
from megatron_ext.command_line import progress
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.role_search.costs import Costs
from megatron_ext.role_search.settings import RoleSearch
from megatron_ext.routing.drawn_tables import Choices, Table, random_table, role_choices
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role, task_and_modality

WINDOW = 0.03
"""The tables of both arms cost at most this much less than they may, relative to lossless dense."""
TRIES = 200_000
"""Random tables that are drawn to find those of that cost."""

Change = tuple[int, int, Role]
"""Layer, class index, and the role there."""


@dataclass(frozen=True)
class Space:
    """What a search chooses from.

    Attributes:
        config: the configuration of a run with the search's plan, without changes to its table.
        plan: that plan.
    """

    config: Config
    plan: Plan
    choices: Choices

    @classmethod
    def of(cls, search: RoleSearch) -> "Space":
        """The space of a search.

        Raises:
            UserError: a configuration cannot be read, or a choice is not legal.
        """
        trees = [*map(config_file.read_yaml, search.base), search.settings, {"plan": search.plan}]
        config = config_file.from_trees(Config, trees)
        plan = Plan.from_config(config)
        if plan.dense_share or plan.drawn_tables:
            raise UserError("'plan' of the search has other roles for some documents; tables change one role table")
        choices = role_choices(search.choices, plan.roles, "choices")
        if not choices:
            raise UserError("'choices' allow no role but those of 'plan'")
        return cls(config, plan, choices)

    @property
    def own(self) -> Table:
        """The table without changes."""
        return self.plan.roles

    def single_changes(self) -> Iterator[Change]:
        """Every entry of a table that may change, with every role that it may have."""
        for (layer, index), roles in self.choices.items():
            for role in roles:
                yield layer, index, role

    def changed(self, *changes: Change) -> Table:
        """The table with some changes."""
        table = [list(roles) for roles in self.own]
        for layer, index, role in changes:
            table[layer][index] = role
        return tuple(map(tuple, table))

    def changes(self, table: Table) -> list[Change]:
        """The changes that make a table."""
        return [
            (layer, index, role)
            for layer, roles in enumerate(table)
            for index, role in enumerate(roles)
            if role != self.own[layer][index]
        ]

    def plan_of(self, table: Table) -> Plan:
        """The plan with another table."""
        return replace(self.plan, name=f"{self.plan.name}+table", roles=table)

    def entries(self, table: Table) -> list[dict]:
        """The entries of ``plan.table`` that make a table: one for each class and role that changes."""
        layers: dict[tuple[int, Role], list[int]] = {}
        for layer, index, role in self.changes(table):
            layers.setdefault((index, role), []).append(layer)
        entries = []
        for (index, role), numbers in sorted(layers.items()):
            task, modality = (value.name.lower() for value in task_and_modality(index))
            where = {"layers": _ranges(numbers), "task": task, "modality": modality}
            entries.append(where | {"role": role.name.lower()})
        return entries

    def random_tables(self, count: int, costs: Costs, cost: float, seed: int, first: int) -> list[Table]:
        """Different random tables that cost at most ``cost``, and little less.

        Args:
            seed, first: the seed of the tables, and the number of the first that is tried.

        Raises:
            UserError: there are too few.
        """
        tables: dict[Table, None] = {}
        with progress(total=count, desc="random tables", leave=False) as bar:
            for number in range(first, first + TRIES):
                table = random_table(self.own, self.choices, seed, number)
                if cost - WINDOW <= costs.ratio(table) <= cost and table not in tables:
                    tables[table] = None
                    bar.update()
                    if len(tables) == count:
                        return list(tables)
        raise UserError(
            f"only {len(tables)} random tables cost {cost - WINDOW:g} to {cost:g}; the search needs {count}"
        )


def key(table: Table) -> str:
    """A table as text: for each layer, the number of the role of each class."""
    return "-".join("".join(str(int(role)) for role in roles) for roles in table)


def distance(first: Table, second: Table) -> int:
    """The number of entries in which two tables differ."""
    return sum(role != other for layers in zip(first, second) for role, other in zip(*layers))


def spread(tables: Sequence[Table], count: int, least: int) -> list[Table]:
    """Up to ``count`` tables, the first that differ from all those before in ``least`` entries; while there are too
    few, those that differ in one entry less follow."""
    entries, chosen = np.array(tables).reshape(len(tables), -1), []
    nearest = np.full(len(tables), entries.shape[1])  # the distance to the nearest of those chosen
    for apart in range(least, 0, -1):
        while len(chosen) < count and (far := np.flatnonzero(nearest >= apart)).size:
            chosen.append(tables[far[0]])
            nearest = np.minimum(nearest, (entries != entries[far[0]]).sum(axis=1))
    return chosen


def _ranges(numbers: list[int]) -> str:
    """``0-2,6`` for 0, 1, 2, 6."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends))
