"""What a task gains from joint training with the other task, and how much of that gain a method costs.

For a metric where higher is better (arXiv 2606.01503; the sign is flipped for FID and losses)::

    gain(method) = (unified - single) / |single|

where single is the reference run: trained on the metric's task alone, *with a common partner_group*, and::

    synergy loss(method) = gain(dense) - gain(method)

per metric, and averaged over the metrics of a task. Both are fractions here, and percent and percentage points in
tables.

Every number is an array [1 + replicates]: the figure, then its bootstrap replicates, so that everything computed from
the figures carries its uncertainty (see :mod:`megatron_ext.analysis.bootstrap`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.analysis.bootstrap import Bootstrap
from megatron_ext.analysis.results import Results, Row
from megatron_ext.errors import UserError

REFERENCE = "dense"
"""The method whose synergy the others are compared with."""
TASKS = ("understanding", "generation")


@dataclass(frozen=True)
class Effect:
    """One metric of one unified method, or the average over a task's metrics; arrays [1 + replicates].

    Attributes:
        metric: its name; ``average`` for the average.
        loss: None where dense has no gain to compare with.
        unified, single: means over seeds, from which the gain is computed; None for an average.
        seeds: the seeds that the gain is a mean over.
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
    """The effects of a unified method in one setting (size, budget, roles in evaluation)."""

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

    def of(self, metric: str) -> Effect | None:
        """The effect in a metric, ``mean understanding`` or ``mean generation``; None if there is none."""
        return self.average(metric.removeprefix("mean ")) if metric.startswith("mean ") else self.effect(metric)

    def loss_of(self, metric: str) -> np.ndarray | None:
        """The synergy loss in a metric, ``mean understanding`` or ``mean generation``; None if there is none."""
        effect = self.of(metric)
        return None if effect is None or effect.loss is None or not np.isfinite(effect.loss[0]) else effect.loss


def gain(unified, single, higher_is_better: bool = True):
    """(unified - single) / |single|, positive where unified is better; NaN where single is 0. Numbers or arrays."""
    unified, single = np.asarray(unified, float), np.asarray(single, float)
    change = np.divide(unified - single, np.abs(single), out=np.full(np.shape(single), np.nan), where=single != 0)
    return change if higher_is_better else -change


def compare(results: Results, bootstrap: Bootstrap | None = None) -> list[Comparison]:
    """The effects of every unified method, by setting, in the order of the rows.

    A gain compares means over the seeds that both runs have; a synergy loss is over the seeds that dense has too. A
    metric is left out where either run lacks it; ``missing`` names tasks without any reference run.

    Raises:
        UserError: two rows have the same method, setting and seed, or could be the same reference run.
    """
    bootstrap = bootstrap or Bootstrap()
    bootstrap.resample_seeds(results.rows)
    comparisons = []
    for setting in dict.fromkeys(row.setting for row in results.rows):
        rows = [row for row in results.rows if row.setting == setting]
        pairs = {
            method: _Pairs(method, rows, results, bootstrap)
            for method in dict.fromkeys(row.method for row in rows if row.task == "unified")
        }
        for method, method_pairs in pairs.items():
            first = next(iter(method_pairs.unified.values()))
            comparison = Comparison(
                method, *setting, method_pairs.flops_ratio, first.parameters, missing=method_pairs.missing
            )
            comparison.effects = list(_effects(method_pairs, pairs.get(REFERENCE)))
            comparison.averages = list(_averages(comparison.effects, results))
            comparisons.append(comparison)
    return comparisons


def against_dense(results: Results, bootstrap: Bootstrap | None = None) -> list[Comparison]:
    """How every other method compares with dense trained on the same task or tasks, by setting.

    The gains are ``(method - dense) / |dense|``, positive where the method is better, over the seeds that both have.

    Raises:
        UserError: two rows have the same method, task, setting and seed.
    """
    bootstrap = bootstrap or Bootstrap()
    bootstrap.resample_seeds(results.rows)
    comparisons = []
    for setting, task in dict.fromkeys((row.setting, row.task) for row in results.rows):
        rows = [row for row in results.rows if (row.setting, row.task) == (setting, task)]
        methods = {
            name: _by_seed([row for row in rows if row.method == name], f"{name}, {task}")
            for name in dict.fromkeys(row.method for row in rows)
        }
        dense = methods.pop(REFERENCE, {})
        for name, by_seed in methods.items():
            first = next(iter(by_seed.values()))
            comparison = Comparison(f"{name}, {task}", *setting, first.flops_ratio, first.parameters)
            for metric, definition in results.metrics.items():
                seeds = [s for s in by_seed if s in dense and _has(by_seed[s], metric) and _has(dense[s], metric)]
                if seeds:
                    both = [bootstrap.mean({s: rows_of[s] for s in seeds}, metric) for rows_of in (by_seed, dense)]
                    change = gain(*both, definition.higher_is_better)
                    comparison.effects.append(Effect(metric, definition.task, change, None, *both, tuple(seeds)))
            comparison.averages = list(_averages(comparison.effects, results))
            if comparison.effects:
                comparisons.append(comparison)
    return comparisons


class _Pairs:
    """A unified method's rows and their single-task reference runs, by seed, in one setting."""

    def __init__(self, method: str, rows: list[Row], results: Results, bootstrap: Bootstrap):
        self.metrics, self._bootstrap = results.metrics, bootstrap
        unified = [row for row in rows if row.method == method and row.task == "unified"]
        self.unified = _by_seed(unified, f"{method}, unified")
        groups = set(unified[0].partner_groups)
        self.single = {
            task: _by_seed(
                [row for row in rows if row.task == task and groups & set(row.partner_groups)],
                f"{task} alone with the partner_group {', '.join(sorted(groups))}",
            )
            for task in TASKS
        }
        self.missing = [f"{method}: nothing is trained on {task} alone" for task in TASKS if not self.single[task]]
        ratios = [row.flops_ratio for row in unified if row.flops_ratio is not None]
        self.flops_ratio = sum(ratios) / len(ratios) if ratios else None

    def seeds(self, metric: str) -> list:
        """The seeds of which both runs have the metric."""
        single = self.single[self.metrics[metric].task]
        return [s for s, row in self.unified.items() if _has(row, metric) and s in single and _has(single[s], metric)]

    def figures(self, metric: str, seeds: list) -> tuple[np.ndarray, np.ndarray]:
        """The means of the unified and the single-task runs over ``seeds``, [1 + replicates] each."""
        single = self.single[self.metrics[metric].task]
        return tuple(self._bootstrap.mean({s: rows[s] for s in seeds}, metric) for rows in (self.unified, single))

    def gain(self, metric: str, seeds: list) -> np.ndarray:
        return gain(*self.figures(metric, seeds), self.metrics[metric].higher_is_better)


def _effects(pairs: _Pairs, dense: _Pairs | None) -> Iterable[Effect]:
    for name, metric in pairs.metrics.items():
        seeds = pairs.seeds(name)
        if not seeds:
            continue
        shared = [s for s in dense.seeds(name) if s in seeds] if dense else []
        loss = dense.gain(name, shared) - pairs.gain(name, shared) if shared else None
        yield Effect(name, metric.task, pairs.gain(name, seeds), loss, *pairs.figures(name, seeds), tuple(seeds))


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


def _by_seed(rows: list[Row], description: str) -> Mapping[int | None, Row]:
    by_seed: dict[int | None, Row] = {}
    for row in rows:
        if row.seed in by_seed:
            where = ", ".join(str(x) for x in (*row.setting, row.seed) if x is not None) or "the results"
            raise UserError(
                f"{where}: two rows are {description}: {by_seed[row.seed].method!r} and {row.method!r}; "
                "give them other partner_groups or seeds"
            )
        by_seed[row.seed] = row
    return by_seed


def _has(row: Row, metric: str) -> bool:
    return row.metrics.get(metric) is not None
