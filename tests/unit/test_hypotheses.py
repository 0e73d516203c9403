"""Hypotheses and gates: verdicts follow from the runs' figures."""

import math

import pytest
from scipy import stats

from megatron_ext import config_file
from megatron_ext.analysis import hypotheses
from megatron_ext.analysis.gate import gates
from megatron_ext.analysis.hypotheses import Hypothesis, Model
from megatron_ext.analysis.results import Metric, Results, Row

LOSS, SCORE = "understanding loss", "GQA, chance-corrected"
METRICS = {LOSS: Metric("understanding", False, False), SCORE: Metric("understanding", scale="points")}
NOISE = (0.98, 1.0, 1.03, 0.99)


def row(method, task, loss, score, seed, **others) -> Row:
    return Row(method, task, method, {LOSS: loss, SCORE: score}, seed=seed, budget="steps", **others)


@pytest.fixture
def results() -> Results:
    """Fast costs 10 % of loss in unified training alone, and from layer 1 on dense loses 5 points."""
    rows = []
    for seed, noise in enumerate(NOISE):
        rows += [row("dense", task, loss, 70.0, seed) for task, loss in (("unified", 1.0), ("understanding", 1.1))]
        rows += [row("fast", "unified", 1.1 * noise, 69.0, seed), row("fast", "understanding", 1.1, 69.0, seed)]
        rows.append(row("dense", "unified", 1.0, 65.0 + 10 * (noise - 1), seed, evaluated_as="from_1"))
    return Results("a test", METRICS, rows)


def read(*claims: dict, name: str = "H", requires: str | None = None) -> Hypothesis:
    tree = {"name": name, "statement": "so it is", "claims": list(claims), "requires": requires}
    return config_file.from_tree(Hypothesis, tree)


INTERACTION = [
    {"method": "fast", "trained_on": "unified"},
    {"method": "dense", "trained_on": "unified", "weight": -1},
    {"method": "fast", "trained_on": "understanding", "weight": -1},
    {"method": "dense", "trained_on": "understanding"},
]
FROZEN = [{"method": "dense", "trained_on": "unified", "evaluated_as": "from_1"}]
FROZEN += [{"method": "dense", "trained_on": "unified", "weight": -1}]


def test_a_claim_is_tested_on_the_contrast_of_each_seed(results):
    (decision,) = hypotheses.decide([read({"metric": LOSS, "terms": INTERACTION, "below": 0})], results, "steps")
    (claim,) = decision.claims
    expected = [-100 * math.log(1.1 * noise) for noise in NOISE]  # losses, so the sign is turned
    assert list(claim.values.values()) == pytest.approx(expected)
    test = stats.ttest_1samp(expected, 0)
    assert claim.p == pytest.approx(test.pvalue) == pytest.approx(decision.p)
    assert (claim.estimate.low, claim.estimate.high) == pytest.approx(test.confidence_interval())
    assert decision.verdict == "supported" and claim.sign_flip == 2 / 16
    assert claim.claim.contrast == "(fast, unified) - (dense, unified) - (fast, understanding) + (dense, understanding)"
    assert decision.as_json()["claims"][0]["budget"] == "steps"


@pytest.mark.parametrize(
    "bounds, verdict",
    [
        ({"above": -2}, "refuted"),
        ({"below": -2}, "supported"),
        ({"below": -4.9}, "undecided"),
        ({"above": -6, "below": -4}, "supported"),
        ({"above": -3, "below": 3}, "refuted"),
        ({"above": -5.1, "below": 3}, "undecided"),
    ],
)
def test_bounds_are_in_points_for_figures_that_may_be_0(results, bounds, verdict):
    (decision,) = hypotheses.decide([read({"metric": SCORE, "terms": FROZEN} | bounds)], results, "steps")
    assert decision.claims[0].estimate.mean == pytest.approx(-5)
    assert decision.verdict == verdict


def test_a_hypothesis_needs_all_its_claims_and_pays_for_the_others(results):
    shown = {"metric": LOSS, "terms": INTERACTION, "below": 0}
    wrong = {"metric": SCORE, "terms": FROZEN, "above": -2}
    absent = shown | {"budget": "total"}
    decisions = hypotheses.decide([read(shown), read(shown, wrong), read(shown, absent)], results, "steps")
    assert [d.verdict for d in decisions] == ["supported", "refuted", "undecided"]
    p, against = decisions[0].claims[0].p, decisions[1].claims[1].p_against
    assert decisions[0].p == pytest.approx(3 * p)  # of three hypotheses, one without a p
    assert decisions[1].p_against == pytest.approx(3 * 2 * against)  # of three, with two claims
    assert decisions[2].claims[1].values == {} and decisions[2].p is None


def test_a_hypothesis_says_nothing_unless_the_one_it_requires_is_supported(results):
    shown, wrong = ({"metric": SCORE, "terms": FROZEN} | bound for bound in ({"below": -2}, {"above": -2}))
    first = [read(shown, name="shown"), read(wrong, name="wrong")]
    needing = [read(claim, name="", requires=name) for name in ("shown", "wrong") for claim in (shown, wrong)]
    decisions = hypotheses.decide(first + needing, results, "steps")
    assert [d.verdict for d in decisions] == ["supported", "refuted", "supported", "refuted", "undecided", "undecided"]
    assert decisions[-1].note == "wrong is not supported"


def test_nothing_is_decided_before_a_claim_has_all_seeds_of_the_study(results):
    planned = {Model(None, "dense", "unified", "steps"): (3, 5, 1, 0), Model(None, "fast", "unified", "steps"): (7,)}
    claim = {"metric": SCORE, "terms": FROZEN, "below": -2}
    absent = {"metric": SCORE, "terms": [{"method": "fast", "trained_on": "unified"}], "below": 0}
    claims = [read(claim, name="a"), read(absent, name="b")]
    decisions = hypotheses.decide(claims, results, "steps", planned=planned)
    assert [d.verdict for d in decisions] == ["incomplete", "incomplete"]
    assert [d.note for d in decisions] == ["without seed 5", "without seed 7"]
    del planned[next(iter(planned))]
    (decision,) = hypotheses.decide(claims[:1], results, "steps", planned=planned)
    assert decision.verdict == "supported"


def test_nothing_is_decided_where_dense_did_not_learn(results):
    (passed,) = gates(results, {SCORE: 60})
    (failed,) = gates(results, {SCORE: 60, "MJHQ-facts, chance-corrected": 60})
    assert passed.passed and passed.reached == {SCORE: 70}  # without other roles and other tasks
    assert not failed.passed and failed.as_json()["verdict"] == "uninformative"
    hypothesis = read({"metric": LOSS, "terms": INTERACTION, "below": 0})
    (decision,) = hypotheses.decide([hypothesis], results, "steps", uninformative=[None])
    assert decision.verdict == "uninformative" and gates(results, {}) == []
