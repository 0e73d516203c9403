"""What a task gains from being trained together with the other, and what a method costs of that gain.

For a metric where higher is better (arXiv 2606.01503; the sign is turned for FID and losses)::

    gain(method) = (unified - single) / |single|

where single is trained on the metric's task alone *with the same partner_group*, and::

    synergy loss(method) = gain(dense) - gain(method)

per metric, and averaged over the metrics of a task. Both are fractions here, percent and percentage points in tables.

Every number is an array [1 + replicates]: the figure itself, then bootstrap replicates of it, so that whatever is
computed from the figures has its uncertainty with it (see :mod:`megatron_ext.analysis.bootstrap`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.analysis.bootstrap import Bootstrap
from megatron_ext.analysis.results import Results, Row
from megatron_ext.errors import UserError

REFERENCE = "dense"
"""The method that the others' synergy is compared with."""
TASKS = ("understanding", "generation")


@dataclass(frozen=True)
class Effect:
    """One metric of one unified method, or the average over a task's metrics; arrays [1 + replicates].

    Attributes:
        metric: its name; ``average`` for the average.
        unified, single: the figures that the gain is made of, means over seeds; None for an average.
        loss: None where the reference has no gain to compare with.
        seeds: those that the gain is a mean over.
    """

    metric: str
    task: str
    gain: np.ndarray
    loss: np.ndarray | None
    unified: np.ndarray | None = None
    single: np.ndarray | None = None
    seeds: tuple = ()


@dataclass
class Comparison:
    """A unified method in one setting (size, budget, roles in evaluation) with all its effects."""

    method: str
    size: str | None
    budget: str | None
    evaluated_as: str | None
    flops_ratio: float | None
    parameters: int | None
    effects: list[Effect] = field(default_factory=list)
    averages: list[Effect] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def effect(self, metric: str) -> Effect | None:
        return next((e for e in self.effects if e.metric == metric), None)

    def average(self, task: str) -> Effect | None:
        return next((e for e in self.averages if e.task == task), None)

    def of(self, what: str) -> Effect | None:
        """A metric's effect, or that of ``mean understanding`` or ``mean generation``; None where there is none."""
        return self.average(what.removeprefix("mean ")) if what.startswith("mean ") else self.effect(what)

    def loss_of(self, what: str) -> np.ndarray | None:
        """Synergy loss, likewise."""
        found = self.of(what)
        return None if found is None or found.loss is None or not np.isfinite(found.loss[0]) else found.loss


def gain(unified, single, higher_is_better: bool = True):
    """(unified - single) / |single|, positive where unified is better; NaN where single is 0. Numbers or arrays."""
    unified, single = np.asarray(unified, float), np.asarray(single, float)
    change = np.divide(unified - single, np.abs(single), out=np.full(np.shape(single), np.nan), where=single != 0)
    return change if higher_is_better else -change


def compare(results: Results, bootstrap: Bootstrap | None = None) -> list[Comparison]:
    """The effects of every unified method, by setting, in the order of the rows.

    A gain is that of means over the seeds that both its rows have; a synergy loss is over the seeds that the reference
    has too. A metric is left out where either side lacks it; why is told in ``missing`` where a whole row is absent.

    Raises:
        UserError: two rows stand for the same method, setting and seed, or could be the same partner.
    """
    bootstrap = bootstrap or Bootstrap()
    bootstrap.draw_seeds(results.rows)
    comparisons = []
    for setting in dict.fromkeys(row.setting for row in results.rows):
        rows = [row for row in results.rows if row.setting == setting]
        pairs = {
            method: _Pairs(method, rows, results, bootstrap)
            for method in dict.fromkeys(row.method for row in rows if row.task == "unified")
        }
        for method, mine in pairs.items():
            first = next(iter(mine.unified.values()))
            made = Comparison(method, *setting, mine.flops_ratio, first.parameters, missing=mine.missing)
            made.effects = list(_effects(mine, pairs.get(REFERENCE)))
            made.averages = list(_averages(made.effects, results))
            comparisons.append(made)
    return comparisons


def against_dense(results: Results, bootstrap: Bootstrap | None = None) -> list[Comparison]:
    """What every other method costs where dense is trained on the same task or tasks, by setting.

    The gains are ``(method - dense) / |dense|``, positive where the method is better, over the seeds that both have.

    Raises:
        UserError: two rows stand for the same method, task, setting and seed.
    """
    bootstrap = bootstrap or Bootstrap()
    bootstrap.draw_seeds(results.rows)
    made = []
    for setting, task in dict.fromkeys((row.setting, row.task) for row in results.rows):
        rows = [row for row in results.rows if (row.setting, row.task) == (setting, task)]
        methods = {
            name: _by_seed([row for row in rows if row.method == name], f"{name}, {task}")
            for name in dict.fromkeys(row.method for row in rows)
        }
        dense = methods.pop(REFERENCE, {})
        for name, mine in methods.items():
            first = next(iter(mine.values()))
            one = Comparison(f"{name}, {task}", *setting, first.flops_ratio, first.parameters)
            for metric, of in results.metrics.items():
                seeds = [s for s in mine if s in dense and _has(mine[s], metric) and _has(dense[s], metric)]
                if seeds:
                    both = [bootstrap.mean({s: of_seed[s] for s in seeds}, metric) for of_seed in (mine, dense)]
                    change = gain(*both, of.higher_is_better)
                    one.effects.append(Effect(metric, of.task, change, None, *both, tuple(seeds)))
            one.averages = list(_averages(one.effects, results))
            if one.effects:
                made.append(one)
    return made


class _Pairs:
    """A unified method's rows and their single-task partners, by seed, in one setting."""

    def __init__(self, method: str, rows: list[Row], results: Results, bootstrap: Bootstrap):
        self.metrics, self._bootstrap = results.metrics, bootstrap
        mine = [row for row in rows if row.method == method and row.task == "unified"]
        self.unified = _by_seed(mine, f"{method}, unified")
        groups = set(mine[0].partner_groups)
        self.single = {
            task: _by_seed(
                [row for row in rows if row.task == task and groups & set(row.partner_groups)],
                f"{task} alone with the partner_group {', '.join(sorted(groups))}",
            )
            for task in TASKS
        }
        self.missing = [f"{method}: nothing is trained on {task} alone" for task in TASKS if not self.single[task]]
        ratios = [row.flops_ratio for row in mine if row.flops_ratio is not None]
        self.flops_ratio = sum(ratios) / len(ratios) if ratios else None

    def seeds(self, metric: str) -> list:
        """The seeds for which both figures are there."""
        single = self.single[self.metrics[metric].task]
        return [s for s, row in self.unified.items() if _has(row, metric) and s in single and _has(single[s], metric)]

    def figures(self, metric: str, seeds: list) -> tuple[np.ndarray, np.ndarray]:
        """Unified and single, means over ``seeds``, [1 + replicates] each."""
        single = self.single[self.metrics[metric].task]
        return tuple(self._bootstrap.mean({s: rows[s] for s in seeds}, metric) for rows in (self.unified, single))

    def gain(self, metric: str, seeds: list) -> np.ndarray:
        return gain(*self.figures(metric, seeds), self.metrics[metric].higher_is_better)


def _effects(mine: _Pairs, reference: _Pairs | None) -> Iterable[Effect]:
    for name, metric in mine.metrics.items():
        seeds = mine.seeds(name)
        if not seeds:
            continue
        shared = [s for s in reference.seeds(name) if s in seeds] if reference else []
        loss = reference.gain(name, shared) - mine.gain(name, shared) if shared else None
        yield Effect(name, metric.task, mine.gain(name, seeds), loss, *mine.figures(name, seeds), tuple(seeds))


def _averages(effects: list[Effect], results: Results) -> Iterable[Effect]:
    for task in TASKS:
        counted = [
            e for e in effects if e.task == task and results.metrics[e.metric].in_average and np.isfinite(e.gain[0])
        ]
        if not counted:
            continue
        losses = [e.loss for e in counted if e.loss is not None and np.isfinite(e.loss[0])]
        seeds = tuple(s for s in counted[0].seeds if all(s in e.seeds for e in counted))
        average = np.mean([e.gain for e in counted], axis=0)
        yield Effect("average", task, average, np.mean(losses, axis=0) if losses else None, seeds=seeds)


def _by_seed(rows: list[Row], what: str) -> Mapping[int | None, Row]:
    found: dict[int | None, Row] = {}
    for row in rows:
        if row.seed in found:
            where = ", ".join(str(x) for x in (*row.setting, row.seed) if x is not None) or "the results"
            raise UserError(
                f"{where}: two rows are {what}: {found[row.seed].method!r} and {row.method!r}; "
                "give them other partner_groups or seeds"
            )
        found[row.seed] = row
    return found


def _has(row: Row, metric: str) -> bool:
    return row.metrics.get(metric) is not None
