"""Simulated studies, from rows of results to the report's intervals and verdicts: they err as often as they say."""

import numpy as np
import pytest

from megatron_ext.analysis import outcomes, synergy, tables
from megatron_ext.analysis.results import Metric, Results, Row

METRIC = "understanding loss"
SEEDS = (2, 3, 4, 5, 6)
STUDIES = 800
"""Simulated studies for each number of seeds."""


def simulated(unified_cost: float, partner_advantage: float) -> list[synergy.Comparison]:
    """The comparisons of the reduced method in all studies, with these true effects in log points.

    Each study is a size of one file of results. What a seed does to all models (SD 20 %) is common; what remains of a
    model has an SD of 1.5 %. The losses are thus paired, and not normal.
    """
    random = np.random.default_rng(5)
    score = {  # log points
        ("dense", "unified"): -70.0,
        ("fast", "unified"): -70.0 - unified_cost,
        ("dense", "understanding"): -80.0,
        ("alone", "understanding"): -80.0 + partner_advantage,
    }
    rows = []
    for study in range(STUDIES * len(SEEDS)):
        seeds = SEEDS[study % len(SEEDS)]
        common, own = random.normal(0, 20, seeds), random.normal(0, 1.5, (seeds, len(score)))
        for seed in range(seeds):
            for place, ((method, task), mean) in enumerate(score.items()):
                loss = float(np.exp(-(mean + common[seed] + own[seed, place]) / 100))
                group = "dense" if method == "dense" else "fast"
                rows.append(Row(method, task, group, {METRIC: loss}, seed=seed, size=str(study)))
    results = Results("simulated", {METRIC: Metric("understanding", False, False)}, rows)
    return [c for c in synergy.compare(results) if c.method == "fast"]


@pytest.fixture(scope="module")
def studies() -> list[synergy.Comparison]:
    """The method is at the margin of equivalence in unified training, its partner run equal to dense's."""
    return simulated(outcomes.MARGIN, 0.0)


def test_intervals_contain_the_truth_at_their_nominal_rate(studies):
    truth = {
        "synergy": 10 - outcomes.MARGIN,
        "unified_cost": outcomes.MARGIN,
        "partner_advantage": 0,
        "loss": outcomes.MARGIN,
    }
    reported = [c["effects"][0] for c in tables.as_json(studies)]
    for quantity, value in truth.items():
        estimates = [effect[quantity] for effect in reported]
        covered = np.array([e["low"] <= value <= e["high"] for e in estimates])
        assert covered.mean() == pytest.approx(0.95, abs=0.01), quantity
        for seeds in SEEDS:
            of_seeds = np.array([e["n"] == seeds for e in estimates])
            assert of_seeds.sum() == STUDIES
            assert covered[of_seeds].mean() == pytest.approx(0.95, abs=0.02), (quantity, seeds)


def test_equivalence_and_difference_are_claimed_wrongly_at_most_at_their_level(studies):
    def share(quantity: str, *verdicts: str, seeds=SEEDS) -> float:
        return np.mean([o.verdict in verdicts for o in tested if o.quantity == quantity and o.estimate.n in seeds])

    tested = outcomes.outcomes(studies[:1500])
    tolerance = 2 * np.sqrt(0.05 * 0.95 / 1500)
    assert share("unified_cost", "equivalent") < 0.05 + tolerance  # it is at the margin, so not equivalent
    assert share("unified_cost", "equivalent", seeds=[6]) > 0.02
    rejected = np.mean([o.p <= 0.05 for o in tested if o.quantity == "partner_advantage"])  # which is 0
    assert 0.05 - tolerance < rejected < 0.05 + tolerance and share("partner_advantage", "better", "worse") < rejected
    assert share("unified_cost", "worse", seeds=[6]) > 0.5 < share("partner_advantage", "equivalent", seeds=[6])
