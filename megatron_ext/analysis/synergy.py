"""What a task gains from joint training with the other task, how much of that gain a method costs, and why.

All models are compared seed by seed, by differences of scores (:meth:`~.results.Metric.score`: log points, 100 ln, or
points; higher is better). U is trained on both tasks. S is its partner run, trained on the metric's task alone, *with a
common partner_group*::

    synergy(method)  =  U - S
    synergy loss     =  synergy(dense) - synergy(method)
                     =  (U_dense - U) + (S - S_dense)
                     =  unified cost + partner advantage

A synergy loss thus has two causes that must not be confused: the method is worse than dense in unified training, or its
partner run is better than dense's. Its negative is the interaction of method and unified training.

The paper's gain (arXiv 2606.01503), (unified - single) / |single| of the means over seeds, stands beside synergy.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_ext.analysis import depth
from megatron_ext.analysis.results import Metric, Results, Row
from megatron_ext.analysis.statistics import Estimate, t_interval
from megatron_ext.errors import UserError

REFERENCE = "dense"
"""The method that the others are compared with."""
TASKS = ("understanding", "generation")
PRIMARY = tuple(f"{task} loss" for task in TASKS)
"""The primary outcomes, validation losses: the NLL of answers and of image codes."""
QUANTITIES = {
    "synergy": "synergy",
    "unified_cost": "unified cost",
    "partner_advantage": "partner advantage",
    "loss": "synergy loss",
}
"""The quantities of an effect, and their names in tables."""
Values = dict[int | None, float]
"""Seed -> a difference of scores."""


@dataclass(frozen=True)
class Effect:
    """One metric of one unified method, or the average over a task's metrics; a quantity without seeds is unknown.

    Where both parts of the synergy loss are known, they are over the same seeds.

    Attributes:
        metric: its name; ``average`` for the average.
        scale: of the quantities, log (points) or points.
        in_average: as of :class:`~.results.Metric`.
        unified, single, gain: the means over the seeds that both have, and the paper's gain, a fraction; None if
            unknown, and the means of an average.
    """

    metric: str
    task: str
    scale: str
    synergy: Values
    unified_cost: Values
    partner_advantage: Values
    unified: float | None = None
    single: float | None = None
    gain: float | None = None
    in_average: bool = False

    @property
    def counts(self) -> bool:
        """Whether it is a result of its own, not a detail of another."""
        return self.in_average or self.metric in PRIMARY

    @property
    def loss(self) -> Values:
        """The synergy loss."""
        advantage = self.partner_advantage
        return {seed: cost + advantage[seed] for seed, cost in self.unified_cost.items() if seed in advantage}

    def estimate(self, quantity: str) -> Estimate | None:
        """A quantity's mean over seeds with its 95 % interval; None if it is unknown."""
        values = getattr(self, quantity)
        return t_interval(list(values.values())) if values else None


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

    @property
    def setting(self) -> tuple[str | None, str | None, str | None]:
        return self.size, self.budget, self.evaluated_as

    def effect(self, metric: str) -> Effect | None:
        return next((e for e in self.effects if e.metric == metric), None)

    def average(self, task: str) -> Effect | None:
        return next((e for e in self.averages if e.task == task), None)

    def of(self, metric: str) -> Effect | None:
        """The effect in a metric, ``mean understanding`` or ``mean generation``; None if there is none."""
        return self.average(metric.removeprefix("mean ")) if metric.startswith("mean ") else self.effect(metric)

    def estimate(self, metric: str, quantity: str) -> Estimate | None:
        """A quantity of a metric or mean, as for :meth:`of`; None if it is unknown."""
        effect = self.of(metric)
        return effect and effect.estimate(quantity)


def gain(unified: float, single: float, higher_is_better: bool = True) -> float | None:
    """The paper's (unified - single) / |single|, positive where unified is better; None where single is 0."""
    if single == 0:
        return None
    change = (unified - single) / abs(single)
    return change if higher_is_better else -change


def compare(results: Results) -> list[Comparison]:
    """The effects of every unified method with a partner_group, by setting, in the order of the rows.

    Points of depth curves are left out: they are for :mod:`~megatron_ext.analysis.depth`. So is a metric where it can
    be compared with nothing, and in a setting where a figure that is compared has no score (it is not finite, or has no
    logarithm); ``missing`` says which, and names tasks without any reference run.

    Raises:
        UserError: two rows have the same method, setting and seed, or could be the same reference run.
    """
    by_setting: Mapping[tuple, list[Row]] = defaultdict(list)
    for row in results.rows:
        if not depth.is_intervention(row):
            by_setting[row.setting].append(row)
    comparisons = []
    for setting, rows in by_setting.items():
        methods = dict.fromkeys(row.method for row in rows if row.task == "unified" and row.partner_groups)
        pairs = {method: _Pairs(method, rows) for method in methods}
        dense = pairs.get(REFERENCE)
        excluded = {
            name: row
            for name, metric in results.metrics.items()
            if (row := _row_without_score(pairs.values(), name, metric))
        }
        notes = [
            f"{name}: left out, {_figure(row, name):g} of {row.method} ({row.task}) has no logarithm or is not finite"
            for name, row in excluded.items()
        ]
        for method, of_method in pairs.items():
            compared = {name: metric for name, metric in results.metrics.items() if name not in excluded}
            effects = [_effect(name, metric, of_method, dense) for name, metric in compared.items()]
            effects = [effect for effect in effects if effect.synergy or effect.unified_cost]
            averages = list(_averages(effects))
            missing = of_method.missing + notes
            parameters = next(iter(of_method.unified.values())).parameters
            comparisons.append(
                Comparison(method, *setting, of_method.flops_ratio, parameters, effects, averages, missing)
            )
    return comparisons


class _Pairs:
    """A unified method's rows and their single-task reference runs, by seed, in one setting."""

    def __init__(self, method: str, rows: list[Row]):
        self.method = method
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


def _effect(name: str, metric: Metric, pairs: _Pairs, dense: _Pairs | None) -> Effect:
    unified, single = (_scores(rows, name, metric) for rows in (pairs.unified, pairs.single[metric.task]))
    cost, advantage = {}, {}
    if dense and dense is not pairs:
        cost = _difference(_scores(dense.unified, name, metric), unified)
        advantage = _difference(single, _scores(dense.single[metric.task], name, metric))
        if both := cost.keys() & advantage.keys():
            cost, advantage = ({s: x for s, x in part.items() if s in both} for part in (cost, advantage))
    means = _means(name, pairs.unified, pairs.single[metric.task])
    return Effect(
        name,
        metric.task,
        metric.scale,
        synergy=_difference(unified, single),
        unified_cost=cost,
        partner_advantage=advantage,
        **dict(zip(("unified", "single"), means or ())),
        gain=gain(*means, metric.higher_is_better) if means and metric.scale == "log" else None,
        in_average=metric.in_average,
    )


def _scores(rows: Mapping[int | None, Row], name: str, metric: Metric) -> Values:
    scores = {seed: metric.score(row.metrics.get(name)) for seed, row in rows.items()}
    return {seed: score for seed, score in scores.items() if score is not None}


def _difference(first: Values, second: Values) -> Values:
    """first - second, for the seeds that both have."""
    return {seed: score - second[seed] for seed, score in first.items() if seed in second}


def _means(name: str, unified: Mapping[int | None, Row], single: Mapping[int | None, Row]) -> list[float] | None:
    """The means of the figures over the seeds that both have."""
    seeds = [s for s in unified if s in single and None not in (_figure(unified[s], name), _figure(single[s], name))]
    return [sum(_figure(rows[s], name) for s in seeds) / len(seeds) for rows in (unified, single)] if seeds else None


def _figure(row: Row, name: str) -> float | None:
    return row.metrics.get(name)


def _averages(effects: list[Effect]) -> Iterable[Effect]:
    """Seed by seed, over the metrics whose quantity is known and the seeds that all of them have."""
    for task in TASKS:
        counted = [e for e in effects if e.task == task and e.in_average and e.scale == "log"]
        if counted:
            quantities = (
                _average([getattr(e, quantity) for e in counted])
                for quantity in ("synergy", "unified_cost", "partner_advantage")
            )
            gains = [e.gain for e in counted if e.gain is not None]
            yield Effect("average", task, "log", *quantities, gain=sum(gains) / len(gains) if gains else None)


def _average(of_metrics: list[Values]) -> Values:
    known = [values for values in of_metrics if values]
    seeds = [seed for seed in known[0] if all(seed in values for values in known)] if known else []
    return {seed: sum(values[seed] for values in known) / len(known) for seed in seeds}


def _row_without_score(pairs: Iterable[_Pairs], name: str, metric: Metric) -> Row | None:
    """A row in a comparison whose figure has no score; None if all have. To leave out its seed alone would bias."""
    rows = [row for of in pairs for by_seed in (of.unified, of.single[metric.task]) for row in by_seed.values()]
    unknown = (row for row in rows if _figure(row, name) is not None and metric.score(_figure(row, name)) is None)
    return next(unknown, None)


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
