"""The stages of a search: which tables are trained, and what is measured before."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.role_search import knapsack, measure, training
from megatron_ext.role_search.costs import Costs, layer_options
from megatron_ext.role_search.measure import Losses
from megatron_ext.role_search.settings import RoleSearch
from megatron_ext.role_search.space import WINDOW, Change, Space, key, spread
from megatron_ext.role_search.training import Trainings
from megatron_ext.routing.drawn_tables import Table

ARMS = ("searched", "random")
SOLUTIONS = 3000
"""The best sums of changes of loss among which candidates are chosen."""
SAVING = 1e-6
"""What the FLOPs of lossless dense are worth in log loss: of equal sums, that of the costlier table is better."""


@dataclass
class Search:
    """The state of a search.

    Attributes:
        tables: the candidates of the search and the random tables by name, in the order of their prediction or of
            their drawing.
        predicted: the change of loss of each: the larger of both tasks' sums of its entries' changes.
        read_only: end before the first measurement that is missing, instead of making it.
        losses: the losses measured with the drawn model, by the table's key.
        rungs: the trainings of the rungs so far.
    """

    settings: RoleSearch
    space: Space
    read_only: bool = False
    costs: Costs | None = None
    tables: dict[str, Table] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    losses: dict[str, Losses] = field(default_factory=dict)
    drawn: Trainings | None = None
    rungs: list[Trainings] = field(default_factory=list)
    fresh: Trainings | None = None

    @classmethod
    def of(cls, settings: RoleSearch, read_only: bool = False) -> "Search":
        """A search that knows its file alone; raises as :meth:`Space.of`."""
        return cls(settings, Space.of(settings), read_only)

    @property
    def measured_file(self) -> Path:
        return Path(self.settings.output) / "measured.json"

    def stages(self) -> Iterator[Trainings]:
        """The trainings, each once those before it have ended."""
        settings, space = self.settings, self.space
        self.drawn = training.drawn_model(settings, space)
        yield self.drawn
        if not self._measure():
            return
        self._find_tables()
        if not self._measure():
            return
        names = self._first_rung()
        for number, rung in enumerate(settings.rungs):
            tables, stage = {name: self.tables[name] for name in names}, f"rung{number + 1}"
            trained = training.of_tables(
                settings, space, stage, tables, rung.tokens, [settings.seed], self.drawn.runs[0].folder
            )
            self.rungs.append(trained)
            yield trained
            following = settings.rungs[number + 1].tables if number + 1 < len(settings.rungs) else 1
            names = [name for arm in ARMS for name in training.best(trained, of_arm(arm, names), following)]
        tables, fresh = {name: self.tables[name] for name in names}, settings.report
        self.fresh = training.of_tables(settings, space, "fresh", tables, fresh.tokens, fresh.seeds)
        yield self.fresh

    def missing(self) -> list[str]:
        """The keys of the tables that are known now and have not been measured."""
        return measure.missing(self.measured_file, self._to_measure())

    def changes(self) -> dict[Change, dict[str, float]]:
        """The change of each task's loss for each single change of a table. One below 0 counts as 0: the best of many
        are the luckiest."""
        base = self.losses[key(self.space.own)]
        return {
            change: {task: max(0.0, ratio) for task, (ratio, _) in losses.log_ratio(base).items()}
            for change, losses in measure.single_changes(self.space, self.losses).items()
        }

    def _to_measure(self) -> dict[str, Table]:
        return measure.tables_to_measure(self.space) | {key(table): table for table in self.tables.values()}

    def _measure(self) -> bool:
        """Measure the tables that are known now. Returns whether their losses are there."""
        if self.read_only and self.missing():
            return False
        run, tables = self.drawn.runs[0].folder, self._to_measure()
        measure.measure(self.measured_file, self.space, run, self.settings.drawn.rows, tables)
        self.losses = measure.measured(self.measured_file, tables)
        return True

    def _find_tables(self) -> None:
        """Solve the knapsack over the changes of loss, and draw the random tables."""
        settings, count = self.settings, self.settings.rungs[0].tables
        file = Path(settings.output) / "costs.json"
        self.costs = Costs.kept(file, self.space.config, self.space.plan, self.space.choices)
        changes = self.changes()
        sums = {change: sum(of_tasks.values()) for change, of_tasks in changes.items()}
        searched = best_tables(self.space, self.costs, sums, settings.cost, SOLUTIONS)
        searched = spread(searched, settings.candidates, settings.distance)
        if len(searched) < count:
            raise UserError(
                f"only {len(searched)} good tables cost {settings.cost - WINDOW:g} to {settings.cost:g}; "
                f"the search needs {count}"
            )
        first = settings.drawn.tables  # random tables come after those that the model's documents drew
        drawn = self.space.random_tables(count, self.costs, settings.cost, settings.drawn.seed, first)
        for arm, tables in zip(ARMS, (searched, drawn)):
            self.tables |= {f"{arm}-{number:02d}": table for number, table in enumerate(tables, 1)}
        for name, table in self.tables.items():
            of_entries = [changes[change] for change in self.space.changes(table)]
            self.predicted[name] = max(sum(entry[task] for entry in of_entries) for task in of_entries[0])

    def _first_rung(self) -> list[str]:
        """The names of the tables that are trained: of the candidates those with the lowest measured losses, but far
        from one another; of the random ones all."""
        base = self.losses[key(self.space.own)]
        searched, drawn = (of_arm(arm, self.tables) for arm in ARMS)
        searched.sort(key=lambda name: self.losses[key(self.tables[name])].worse(base))
        names = {self.tables[name]: name for name in searched}
        chosen = spread(list(names), self.settings.rungs[0].tables, self.settings.distance)
        return [names[table] for table in chosen] + drawn


def of_arm(arm: str, names: Iterable[str]) -> list[str]:
    """The names of one arm."""
    return [name for name in names if name.startswith(arm)]


def best_tables(space: Space, costs: Costs, changes: dict[Change, float], cost: float, count: int) -> list[Table]:
    """The tables with the smallest sums of changes of loss that cost at most ``cost`` of lossless dense, best first.

    Returns:
        Those of the best ``count`` that cost little less (:data:`.space.WINDOW`), as random tables do.
    """
    options = [list(layer_options(space.own, space.choices, layer)) for layer in range(len(space.own))]

    def value(layer: int, roles: tuple) -> float:
        own = space.own[layer]
        changed = sum(changes[layer, index, role] for index, role in enumerate(roles) if role != own[index])
        return changed - SAVING * costs.layer[roles] / costs.base

    groups = [[(costs.layer[roles], value(n, roles)) for roles in of_layer] for n, of_layer in enumerate(options)]
    budget = int(cost * costs.base) - costs.ends
    tables = [
        tuple(options[layer][pick] for layer, pick in enumerate(picks))
        for picks in knapsack.best(groups, budget, count)
    ]
    return [table for table in tables if costs.ratio(table) >= cost - WINDOW]
