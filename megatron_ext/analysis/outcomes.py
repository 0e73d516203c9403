"""Tests of the primary outcomes: which differences are shown, and which are shown to be none."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_ext.analysis import statistics
from megatron_ext.analysis.statistics import LEVEL, Estimate
from megatron_ext.analysis.synergy import PRIMARY, QUANTITIES, Comparison

MARGIN = 100 * statistics.MARGIN
"""In log points: differences within it, shown by two one-sided tests, are none."""
_WHERE_ABOVE = {"synergy": "better", "unified_cost": "worse", "partner_advantage": "better", "loss": "worse"}
_OPPOSITE = {"better": "worse", "worse": "better"}


@dataclass(frozen=True)
class Outcome:
    """The tests of one quantity of a method in a primary outcome.

    Attributes:
        sign_flip: the exact p from changes of sign, a check of the t test.
        p, p_equivalent: of the t test and of the equivalence test, each adjusted over its family: the methods and
            primary outcomes of the same quantity and setting, where methods with the same partner run count once. None
            for one seed.
        verdict: equivalent (to no difference), better, worse, undecided, uninformative or incomplete. Of synergy: the
            unified run against its partner run; of unified cost: the method against dense; of partner advantage: its
            partner run against dense's; of synergy loss: its synergy against dense's.
    """

    method: str
    size: str | None
    budget: str | None
    evaluated_as: str | None
    metric: str
    quantity: str
    estimate: Estimate
    sign_flip: float
    p: float | None
    p_equivalent: float | None
    verdict: str


def outcomes(
    comparisons: Sequence[Comparison],
    uninformative: Collection[str | None] = (),
    incomplete: Collection[tuple[str | None, str | None]] = (),
) -> list[Outcome]:
    """The tests of the primary outcomes, setting by setting.

    Args:
        uninformative: sizes at which nothing is decided, because dense did not learn the tasks.
        incomplete: sizes and budgets at which runs are missing, so that neither values nor families of tests are whole.
    """
    by_setting: Mapping[tuple, list[Comparison]] = defaultdict(list)
    for c in comparisons:
        by_setting[c.setting].append(c)
    tested = []
    for of_setting in by_setting.values():
        for quantity in QUANTITIES:
            tested += _family(quantity, of_setting)
    tested = [replace(o, verdict="uninformative") if o.size in uninformative else o for o in tested]
    return [replace(o, verdict="incomplete") if (o.size, o.budget) in incomplete else o for o in tested]


def _family(quantity: str, comparisons: Sequence[Comparison]) -> list[Outcome]:
    members = [(c, metric, c.effect(metric)) for metric in PRIMARY for c in comparisons]
    members = [(c, metric, tuple(getattr(e, quantity).values())) for c, metric, e in members if e]
    members = [member for member in members if member[-1]]
    family = list(dict.fromkeys((metric, values) for _, metric, values in members))
    p_different = _adjusted(family, [statistics.t_interval(values).p for _, values in family])
    p_equivalent = _adjusted(family, [statistics.equivalence(values, MARGIN).p for _, values in family])
    tested = []
    for c, metric, values in members:
        estimate, p, equivalent = (
            statistics.t_interval(values),
            p_different[metric, values],
            p_equivalent[metric, values],
        )
        verdict = _verdict(quantity, estimate, p, equivalent)
        signs = statistics.sign_flip(values)
        tested.append(Outcome(c.method, *c.setting, metric, quantity, estimate, signs, p, equivalent, verdict))
    return tested


def _adjusted(family: list[tuple], p_values: list[float | None]) -> dict[tuple, float | None]:
    return dict(zip(family, statistics.holm(p_values)))


def _verdict(quantity: str, estimate: Estimate, p: float | None, p_equivalent: float | None) -> str:
    if p_equivalent is not None and p_equivalent <= 1 - LEVEL:
        return "equivalent"
    if p is None or p > 1 - LEVEL:
        return "undecided"
    above = _WHERE_ABOVE[quantity]
    return above if estimate.mean > 0 else _OPPOSITE[above]
