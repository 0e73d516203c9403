"""Checks of a study's gate and hypotheses: whether its runs can decide them, as far as the study file shows."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.analysis.hypotheses import Claim, Hypothesis, Model
from megatron_ext.analysis.synergy import PRIMARY, TASKS
from megatron_ext.errors import UserError

CHANCE_CORRECTED = {"gqa": "GQA, chance-corrected", "mjhq": "MJHQ-facts, chance-corrected"}
"""Benchmark -> its figure that is corrected for chance."""


@dataclass(frozen=True)
class Planned:
    """What a study trains and measures.

    Attributes:
        seeds: of every model.
        roles: (method, trained on) -> names of the sets of roles in evaluation.
        benchmarks: name -> the task of the models that answer it.
        budgets: the first is that of claims that name none.
    """

    seeds: Mapping[Model, Collection[int]]
    roles: Mapping[tuple[str, str], Collection[str]]
    benchmarks: Mapping[str, str]
    budgets: Sequence[str]


def check(hypotheses: Sequence[Hypothesis], gate: Mapping[str, float], planned: Planned) -> None:
    """Check a study's gate and hypotheses.

    Raises:
        UserError: a name is unknown or used twice, or nothing that the study trains can decide a claim.
    """
    names = [hypothesis.name for hypothesis in hypotheses]
    for i, hypothesis in enumerate(hypotheses):
        if names.count(hypothesis.name) > 1:
            raise UserError(f"'hypotheses[{i}].name' is {hypothesis.name!r}, like another one; use another name")
        if hypothesis.requires is not None and hypothesis.requires not in names[:i]:
            raise UserError(f"'hypotheses[{i}].requires' is {hypothesis.requires!r}, must name an earlier hypothesis")
        if not hypothesis.claims:
            raise UserError(f"'hypotheses[{i}].claims' is empty; {hypothesis.name} needs a claim")
        for j, claim in enumerate(hypothesis.claims):
            _check_claim(f"hypotheses[{i}].claims[{j}]", claim, planned)
    for metric, least in gate.items():
        _task("gate", metric, planned.benchmarks)
        if isinstance(least, bool) or not isinstance(least, int | float):
            raise UserError(f"'gate.{metric}' is {least!r}, must be a number")


def _check_claim(where: str, claim: Claim, planned: Planned) -> None:
    task = _task(f"{where}.metric", claim.metric, planned.benchmarks)
    if claim.above is None and claim.below is None:
        raise UserError(f"'{where}' has no bound; give it above, below, or both")
    if None not in (claim.above, claim.below) and claim.above >= claim.below:
        raise UserError(f"'{where}' is above {claim.above:g} and below {claim.below:g}, which nothing is")
    if claim.budget is not None and claim.budget not in planned.budgets:
        raise UserError(f"'{where}.budget' is {claim.budget!r}, must be one of {', '.join(planned.budgets)}")
    if not claim.terms:
        raise UserError(f"'{where}.terms' is empty; give it at least one model")
    for k, term in enumerate(claim.terms):
        roles = planned.roles.get((term.method, term.trained_on))
        if roles is None:
            raise UserError(f"'{where}.terms[{k}]': no method trained on {term.trained_on} is labelled {term.method!r}")
        if term.trained_on not in ("unified", task):
            raise UserError(f"'{where}.terms[{k}]' is trained on {term.trained_on}, and has no {claim.metric}")
        if term.evaluated_as is not None and term.evaluated_as not in roles:
            raise UserError(f"'{where}.terms[{k}].evaluated_as' is {term.evaluated_as!r}, not in its 'evaluate_as'")
    budget = claim.budget or planned.budgets[0]
    sizes = dict.fromkeys(model.size for model in planned.seeds)
    if not any(claim.seeds(planned.seeds, size, budget) for size in sizes):
        raise UserError(f"'{where}': at no size have all of its models a seed in common at the budget {budget!r}")


def _task(where: str, metric: str, benchmarks: Mapping[str, str]) -> str:
    """The task of a metric, which must be one of the study, as far as its name shows."""
    exact = dict(zip(PRIMARY, TASKS)) | {CHANCE_CORRECTED[b]: t for b, t in benchmarks.items() if b in CHANCE_CORRECTED}
    if metric in exact:
        return exact[metric]
    known = [benchmark for benchmark in benchmarks if metric.lower().startswith(benchmark)]
    if not known or "chance" in metric or metric.endswith("loss"):
        raise UserError(
            f"'{where}' names {metric!r}; there are {', '.join(exact)}, and what begins with the name of one of the "
            f"study's benchmarks ({', '.join(benchmarks) or 'none'})"
        )
    return benchmarks[max(known, key=len)]
