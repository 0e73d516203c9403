"""Hypotheses about a study's models, named before the runs and decided by their figures.

A hypothesis is one or several claims, each about a contrast: a weighted sum of scores (see
:meth:`~.results.Metric.score`: log points or points, higher is better), computed for each seed. With a reduced method m
and dense, U trained on both tasks and S on one, the usual contrasts are::

    unified cost         U_dense - U_m
    partner advantage    S_m - S_dense
    interaction          U_m - U_dense - S_m + S_dense, the synergy loss with its sign turned

It is supported if all of its claims are, and refuted if one is: p for it is the largest of its claims' (all must be
shown), p against it the smallest times their number. Both are adjusted by Holm's method over the hypotheses of a size.
It is incomplete while a claim lacks a seed that the study was to have, and undecided while one that it requires is not
supported.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, NamedTuple

from megatron_ext.analysis import statistics
from megatron_ext.analysis.results import Results, Row
from megatron_ext.analysis.statistics import LEVEL, Estimate


class Model(NamedTuple):
    """What a study trains with several seeds."""

    size: str | None
    method: str
    trained_on: str
    budget: str | None


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

    def seeds(self, planned: Mapping[Model, Collection[int]], size: str | None, budget: str | None) -> list[int]:
        """The seeds that all of its models are to have; none where one is not trained at all.

        Args:
            budget: where the claim names none.
        """
        models = [Model(size, term.method, term.trained_on, self.budget or budget) for term in self.terms]
        of_terms = [planned.get(model, ()) for model in models]
        return [seed for seed in of_terms[0] if all(seed in of_term for of_term in of_terms)]


@dataclass
class Hypothesis:
    """What the study was made to decide."""

    name: str
    statement: str
    claims: list[Claim] = field(default_factory=list)
    requires: str | None = None
    """An earlier hypothesis: unless it is supported, this one is undecided, whatever its claims."""


@dataclass(frozen=True)
class Decided:
    """A claim with its contrast.

    Attributes:
        values: seed -> the contrast, for the seeds that all of its models have.
        p: for the claim; two-sided for one bound, the larger of two one-sided tests for two. None for fewer than two
            seeds.
        p_against: for a contrast on the other side.
        sign_flip: the exact check of ``p`` from changes of sign, 1 on the other side of the bound; None for two bounds.
        missing: planned seeds without a value.
    """

    claim: Claim
    values: dict[int | None, float]
    estimate: Estimate | None
    p: float | None
    p_against: float | None
    sign_flip: float | None
    missing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decision:
    """A hypothesis at a size; ``verdict`` is supported, refuted, undecided, uninformative or incomplete.

    Attributes:
        p, p_against: adjusted for the number of hypotheses; None where a claim has fewer than two seeds.
        note: why nothing is decided, where that does not follow from p.
    """

    hypothesis: Hypothesis
    size: str | None
    claims: list[Decided]
    p: float | None
    p_against: float | None
    verdict: str
    note: str = ""

    def as_json(self) -> dict:
        return {
            "hypothesis": self.hypothesis.name,
            "statement": self.hypothesis.statement,
            "size": self.size,
            "verdict": self.verdict,
            "note": self.note,
            "p_adjusted": self.p,
            "p_against_adjusted": self.p_against,
            "claims": [
                {
                    "contrast": decided.claim.contrast,
                    "claim": str(decided.claim),
                    "metric": decided.claim.metric,
                    "budget": decided.claim.budget,
                    "seeds": list(decided.values),
                    "missing_seeds": list(decided.missing),
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
    planned: Mapping[Model, Collection[int]] | None = None,
) -> list[Decision]:
    """Decide every hypothesis at every size.

    Args:
        budget: of claims that name none.
        uninformative: sizes at which nothing is decided, because dense did not learn the tasks.
        planned: the seeds that every model is to have; None: those that it has.
    """
    decisions = []
    for size in dict.fromkeys([row.size for row in results.rows] + [model.size for model in planned or ()]):
        models: Mapping[tuple, dict[int | None, Row]] = defaultdict(dict)
        for row in results.rows:
            if row.size == size:
                models[row.method, row.task, row.budget, row.evaluated_as][row.seed] = row
        claims = [
            [_decide(c, results, models, budget, c.seeds(planned or {}, size, budget)) for c in h.claims]
            for h in hypotheses
        ]
        p_for = statistics.holm([_all_shown(of_one) for of_one in claims])
        p_against = statistics.holm([_one_refuted(of_one) for of_one in claims])
        supported = set()
        for hypothesis, of_one, p, against in zip(hypotheses, claims, p_for, p_against):
            verdict, note = _verdict(p, against), ""
            if hypothesis.requires not in (None, *supported):
                verdict, note = "undecided", f"{hypothesis.requires} is not supported"
            if size in uninformative:
                verdict, note = "uninformative", "dense did not learn the tasks"
            if missing := sorted({seed for decided in of_one for seed in decided.missing}):
                verdict, note = "incomplete", f"without seed {', '.join(map(str, missing))}"
            if verdict == "supported":
                supported.add(hypothesis.name)
            decisions.append(Decision(hypothesis, size, of_one, p, against, verdict, note))
    return decisions


def _decide(
    claim: Claim, results: Results, models: Mapping[tuple, dict], budget: str | None, planned: Sequence[int]
) -> Decided:
    claim = replace(claim, budget=claim.budget or budget)
    values = _contrast(claim, results, models)
    missing = tuple(seed for seed in planned if seed not in values)
    if not values:
        return Decided(claim, values, None, None, None, None, missing)
    contrast = list(values.values())
    estimate = statistics.t_interval(contrast)
    if estimate.n == 1:
        return Decided(claim, values, estimate, None, None, None, missing)
    # p of a mean above the lower bound, above the upper one, and of the opposites.
    above, below = claim.above, claim.below
    inside = [statistics.one_sided(contrast, above)] if above is not None else []
    inside += [_one_sided_below(contrast, below)] if below is not None else []
    outside = [_one_sided_below(contrast, above)] if above is not None else []
    outside += [statistics.one_sided(contrast, below)] if below is not None else []
    against = min(1.0, 2 * min(outside))
    if len(inside) == 2:
        return Decided(claim, values, estimate, max(inside), against, None, missing)
    bound = below if above is None else above
    flipped = statistics.sign_flip([value - bound for value in contrast]) if inside[0] < outside[0] else 1.0
    return Decided(claim, values, estimate, min(1.0, 2 * inside[0]), against, flipped, missing)


def _contrast(claim: Claim, results: Results, models: Mapping[tuple, dict]) -> dict:
    """Seed -> the weighted sum of scores, for the seeds of which all models have the figure."""
    if claim.metric not in results.metrics:
        return {}
    metric, scores = results.metrics[claim.metric], []
    for term in claim.terms:
        rows = models.get((term.method, term.trained_on, claim.budget, term.evaluated_as), {})
        of_term = {seed: metric.score(row.metrics.get(claim.metric)) for seed, row in rows.items()}
        scores.append({seed: term.weight * score for seed, score in of_term.items() if score is not None})
    shared = [seed for seed in scores[0] if all(seed in others for others in scores)] if scores else []
    return {seed: sum(term_scores[seed] for term_scores in scores) for seed in shared}


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
