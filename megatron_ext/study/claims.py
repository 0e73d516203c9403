"""Hypotheses of a study file: claims about sums over models, to be decided by the report."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ext.errors import UserError


@dataclass
class Claim:
    """A sum over models, compared with a bound: one number per seed, which the report tests."""

    metric: str
    """A loss, or a column of a benchmark's scores."""
    contrast: dict
    """Model -> weight. A model is a method's name, or ``NAME as ROLES`` for an entry of ``evaluate_as``. Its value is
    100 ln of the metric, with the sign turned for losses, so that more is better; the metric itself if the claim is in
    points."""
    claim: str
    """``below X``, ``above X``, ``below X points``, ``above X points``, or ``equivalent`` (to 0, within 3 %)."""
    budget: str | None = None
    """The budget of all its runs; None: the study's first."""

    @property
    def terms(self) -> list[tuple[float, str, str | None]]:
        """Weight, method's name and entry of ``evaluate_as`` (None: the roles of training) of each model."""
        parts = [(weight, *model.partition(" as ")) for model, weight in self.contrast.items()]
        return [(float(weight), name, roles or None) for weight, name, _, roles in parts]

    @property
    def kind(self) -> str:
        """below, above or equivalent."""
        return self.claim.split()[0]

    @property
    def bound(self) -> float:
        """X; 0 for equivalence."""
        return 0.0 if self.kind == "equivalent" else float(self.claim.split()[1])

    @property
    def in_points(self) -> bool:
        """Whether it is about differences of the metric, and not about log ratios."""
        return self.claim.endswith(" points")

    def is_readable(self) -> bool:
        """Whether ``claim`` has one of its forms."""
        return bool(re.fullmatch(r"equivalent|(below|above) -?\d+(\.\d+)?( points)?", self.claim))


@dataclass
class Hypothesis:
    """A statement that holds where all its claims do; decided at each size."""

    name: str
    statement: str
    claims: list[Claim]


def check(
    hypotheses: Iterable[Hypothesis], roles: dict[str, Iterable[str]], budgets: Iterable[str], metrics: Iterable[str]
) -> None:
    """Check that hypotheses name what the study has.

    Args:
        roles: method's name -> its entries of ``evaluate_as``.
        metrics: the beginnings of metrics' names.

    Raises:
        UserError: names the entry that is wrong, and what it may be.
    """
    names = set()
    for i, hypothesis in enumerate(hypotheses):
        if hypothesis.name in names:
            raise UserError(f"'hypotheses[{i}].name' is {hypothesis.name!r}, like an earlier one; use another name")
        names.add(hypothesis.name)
        if not hypothesis.claims:
            raise UserError(f"'hypotheses[{i}].claims' is empty; {hypothesis.name} needs a claim")
        for j, claim in enumerate(hypothesis.claims):
            _check_claim(f"hypotheses[{i}].claims[{j}]", claim, roles, budgets, metrics)


def check_metric(where: str, metric: str, metrics: Iterable[str]) -> None:
    """Check that a benchmark or a loss of the study gives a metric.

    Raises:
        UserError: none does.
    """
    if not any(metric.lower().startswith(start) for start in metrics):
        raise UserError(f"'{where}' names the metric {metric!r}; its losses and benchmarks are {', '.join(metrics)}")


def _check_claim(where: str, claim: Claim, roles: dict, budgets: Iterable[str], metrics: Iterable[str]) -> None:
    check_metric(f"{where}.metric", claim.metric, metrics)
    if not claim.is_readable():
        raise UserError(
            f"'{where}.claim' is {claim.claim!r}, must be 'below X', 'above X' (or 'X points') or 'equivalent'"
        )
    if claim.budget is not None and claim.budget not in budgets:
        raise UserError(f"'{where}.budget' is {claim.budget!r}, must be one of {', '.join(budgets)}")
    if not claim.contrast:
        raise UserError(f"'{where}.contrast' is empty; give it at least one model with a weight")
    for model, weight in claim.contrast.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"'{where}.contrast' gives {model} the weight {weight!r}, must be a number")
    for _, method, as_roles in claim.terms:
        if method not in roles:
            raise UserError(f"'{where}.contrast' has {method!r}, which is not among the study's 'methods'")
        if as_roles is not None and as_roles not in roles[method]:
            raise UserError(f"'{where}.contrast' has {method!r} as {as_roles!r}, which is not in its 'evaluate_as'")
