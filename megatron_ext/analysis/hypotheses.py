"""Hypotheses about a study's models, named before the runs and decided by their figures.

A hypothesis is one or several claims, each about a contrast: a weighted sum of scores (see
:meth:`~.results.Metric.score`: log points or points, higher is better), computed for each seed. With a reduced method m
and dense, U trained on both tasks and S on one, the usual contrasts are::

    unified cost         U_dense - U_m
    partner advantage    S_m - S_dense
    interaction          U_m - U_dense - S_m + S_dense, the synergy loss with its sign turned

It is supported if all of its claims are, and refuted if one is: p for it is the largest of its claims' (all must be
shown), p against it the smallest times their number. Both are adjusted by Holm's method over the hypotheses of a size.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from megatron_ext.analysis import statistics
from megatron_ext.analysis.results import Results, Row
from megatron_ext.analysis.statistics import LEVEL, Estimate


@dataclass
class Term:
    """A model's score in a contrast."""

    method: str
    """Its name in tables."""
    trained_on: Literal["understanding", "generation", "unified"]
    weight: float = 1
    evaluated_as: str | None = None
    """Its roles in evaluation; None: those of training."""

    def __str__(self) -> str:
        roles = f" as {self.evaluated_as}" if self.evaluated_as else ""
        factor = "" if abs(self.weight) == 1 else f"{abs(self.weight):g} "
        return f"{'-' if self.weight < 0 else '+'} {factor}({self.method}, {self.trained_on}{roles})"


@dataclass
class Claim:
    """A contrast is above a bound, below one, or between two (equivalence)."""

    metric: str
    terms: list[Term]
    above: float | None = None
    below: float | None = None
    budget: str | None = None
    """None: the study's first."""

    def __str__(self) -> str:
        bounds = (("above", self.above), ("below", self.below))
        return " and ".join(f"{side} {bound:g}" for side, bound in bounds if bound is not None)

    @property
    def contrast(self) -> str:
        """The weighted sum in words."""
        return " ".join(map(str, self.terms)).removeprefix("+ ")


@dataclass
class Hypothesis:
    """What the study was made to decide."""

    name: str
    statement: str
    claims: list[Claim] = field(default_factory=list)


@dataclass(frozen=True)
class Decided:
    """A claim with its contrast.

    Attributes:
        values: seed -> the contrast, for the seeds that all of its models have.
        p: for the claim; two-sided for one bound, the larger of two one-sided tests for two. None for fewer than two
            seeds.
        p_against: for a contrast on the other side.
        sign_flip: the exact check of ``p`` from changes of sign, 1 on the other side of the bound; None for two bounds.
    """

    claim: Claim
    values: dict[int | None, float]
    estimate: Estimate | None
    p: float | None
    p_against: float | None
    sign_flip: float | None


@dataclass(frozen=True)
class Decision:
    """A hypothesis at a size; ``verdict`` is supported, refuted, undecided or uninformative.

    Attributes:
        p, p_against: adjusted for the number of hypotheses; None where a claim has fewer than two seeds.
    """

    hypothesis: Hypothesis
    size: str | None
    claims: list[Decided]
    p: float | None
    p_against: float | None
    verdict: str

    def as_json(self) -> dict:
        return {
            "hypothesis": self.hypothesis.name,
            "statement": self.hypothesis.statement,
            "size": self.size,
            "verdict": self.verdict,
            "p_adjusted": self.p,
            "p_against_adjusted": self.p_against,
            "claims": [
                {
                    "contrast": decided.claim.contrast,
                    "claim": str(decided.claim),
                    "metric": decided.claim.metric,
                    "budget": decided.claim.budget,
                    "seeds": list(decided.values),
                    "estimate": decided.estimate and asdict(decided.estimate),
                    "p": decided.p,
                    "p_against": decided.p_against,
                    "sign_flip": decided.sign_flip,
                }
                for decided in self.claims
            ],
        }


def decide(
    hypotheses: Sequence[Hypothesis],
    results: Results,
    budget: str | None = None,
    uninformative: Collection[str | None] = (),
) -> list[Decision]:
    """Decide every hypothesis at every size.

    Args:
        budget: of claims that name none.
        uninformative: sizes at which nothing is decided, because dense did not learn the tasks.
    """
    decisions = []
    for size in dict.fromkeys(row.size for row in results.rows):
        models: Mapping[tuple, dict[int | None, Row]] = defaultdict(dict)
        for row in results.rows:
            if row.size == size:
                models[row.method, row.task, row.budget, row.evaluated_as][row.seed] = row
        claims = [[_decide(claim, results, models, budget) for claim in h.claims] for h in hypotheses]
        p_for = statistics.holm([_all_shown(of_one) for of_one in claims])
        p_against = statistics.holm([_one_refuted(of_one) for of_one in claims])
        for hypothesis, of_one, p, against in zip(hypotheses, claims, p_for, p_against):
            verdict = "uninformative" if size in uninformative else _verdict(p, against)
            decisions.append(Decision(hypothesis, size, of_one, p, against, verdict))
    return decisions


def _decide(claim: Claim, results: Results, models: Mapping[tuple, dict], budget: str | None) -> Decided:
    claim = replace(claim, budget=claim.budget or budget)
    values = _contrast(claim, results, models)
    if not values:
        return Decided(claim, values, None, None, None, None)
    contrast = list(values.values())
    estimate = statistics.t_interval(contrast)
    if estimate.n == 1:
        return Decided(claim, values, estimate, None, None, None)
    # p of a mean above the lower bound, above the upper one, and of the opposites.
    above, below = claim.above, claim.below
    inside = [statistics.one_sided(contrast, above)] if above is not None else []
    inside += [_one_sided_below(contrast, below)] if below is not None else []
    outside = [_one_sided_below(contrast, above)] if above is not None else []
    outside += [statistics.one_sided(contrast, below)] if below is not None else []
    against = min(1.0, 2 * min(outside))
    if len(inside) == 2:
        return Decided(claim, values, estimate, max(inside), against, None)
    bound = below if above is None else above
    flipped = statistics.sign_flip([value - bound for value in contrast]) if inside[0] < outside[0] else 1.0
    return Decided(claim, values, estimate, min(1.0, 2 * inside[0]), against, flipped)


def _contrast(claim: Claim, results: Results, models: Mapping[tuple, dict]) -> dict:
    """Seed -> the weighted sum of scores, for the seeds of which all models have the figure."""
    if claim.metric not in results.metrics:
        return {}
    metric, scores = results.metrics[claim.metric], []
    for term in claim.terms:
        rows = models.get((term.method, term.trained_on, claim.budget, term.evaluated_as), {})
        found = {seed: metric.score(row.metrics.get(claim.metric)) for seed, row in rows.items()}
        scores.append({seed: term.weight * score for seed, score in found.items() if score is not None})
    shared = [seed for seed in scores[0] if all(seed in others for others in scores)] if scores else []
    return {seed: sum(of_term[seed] for of_term in scores) for seed in shared}


def _one_sided_below(values: Sequence[float], bound: float) -> float:
    return statistics.one_sided([-value for value in values], -bound)


def _all_shown(claims: Sequence[Decided]) -> float | None:
    """p of the hypothesis: all claims must be shown, so no adjustment for their number."""
    return None if any(decided.p is None for decided in claims) else max(decided.p for decided in claims)


def _one_refuted(claims: Sequence[Decided]) -> float | None:
    """p against the hypothesis: one claim is enough, so times their number."""
    known = [decided.p_against for decided in claims if decided.p_against is not None]
    return min(1.0, len(claims) * min(known)) if known else None


def _verdict(p: float | None, p_against: float | None) -> str:
    if p is not None and p <= 1 - LEVEL:
        return "supported"
    return "refuted" if p_against is not None and p_against <= 1 - LEVEL else "undecided"
