"""Causal depth curves of made-up results whose changes and trends are known, the trends by SciPy."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from megatron_ext.analysis import depth, depth_report
from megatron_ext.analysis.results import Metric, Results, Row

LOSS, SCORE = "understanding loss", "GQA, chance-corrected"
LAYERS = (0, 2, 3, 6)
METRICS = {
    LOSS: Metric("understanding", higher_is_better=False),
    SCORE: Metric("understanding", scale="points"),
    "generation loss": Metric("generation", higher_is_better=False),
    "MJHQ-FID": Metric("generation", higher_is_better=False),
}


def results_of(seeds: int) -> tuple[Results, np.ndarray]:
    """Results of ``seeds`` seeds and, of each seed and layer, the loss, [seeds, layers]."""
    random = np.random.default_rng(0)
    losses = np.exp(-0.1 * np.array(LAYERS) + random.normal(0, 0.05, (seeds, 1)) + random.normal(0, 0.02, (seeds, 4)))
    results = Results("a test", METRICS)

    def add(method: str, roles: str | None, seed: int, **metrics) -> None:
        named = dict(zip(("loss", "score", "generation"), METRICS))
        figures = {named[name]: float(value) for name, value in metrics.items()} | {"MJHQ-FID": 7.0}
        results.rows.append(
            Row(method, "unified", "dense", figures, seed=seed, size="small", budget="steps", evaluated_as=roles)
        )

    for seed in range(seeds):
        add("dense", None, seed, loss=0.5, score=60 + seed, generation=2.0)
        for place, layer in enumerate(LAYERS):
            add("dense", f"himix_from_{layer}", seed, loss=losses[seed, place], score=-5 + 10 * layer, generation=2.0)
        add("dense", "skip_from_1", seed, loss=0.5, score=60, generation=4.0)
        add("share-all", None, seed, loss=0.6, score=50, generation=2.1)
    add("untrained", None, 0, loss=5.5, score=0, generation=6.0)
    add("dense", "himix_from_0", 77, loss=0.9, score=1, generation=2.0)  # a seed without the other rows
    return results, losses


def test_changes_and_trends_are_paired_by_seed():
    results, losses = results_of(6)
    curves = {(c.intervention, c.metric): c for c in depth.curves(results)}
    assert set(curves) == {("himix_from", LOSS), ("himix_from", SCORE), ("skip_from", "generation loss")}
    curve = curves["himix_from", LOSS]
    assert curve.layers == LAYERS and curve.seeds == tuple(range(6)) and curve.method == "dense"
    slopes = [stats.linregress(LAYERS, -100 * np.log(of_seed)).slope for of_seed in losses]
    interval = stats.ttest_1samp(slopes, 0).confidence_interval()
    assert curve.trend.mean == pytest.approx(np.mean(slopes)) and 8 < curve.trend.mean < 12
    assert (curve.trend.low, curve.trend.high) == pytest.approx(tuple(interval))
    assert curve.trend.p == pytest.approx(stats.ttest_1samp(slopes, 0).pvalue)
    assert curve.changes[2].mean == pytest.approx(100 * np.mean(np.log(0.5) - np.log(losses[:, 1])))
    # Scores of 0 and below are compared in points: 10 a layer, whatever the seed.
    points = curves["himix_from", SCORE]
    assert points.changes[0].mean == pytest.approx(-5 - 62.5) and points.trend.mean == pytest.approx(10)
    assert curves["skip_from", "generation loss"].trend is None
    assert curves["skip_from", "generation loss"].changes[1].mean == pytest.approx(-100 * np.log(2))


def test_a_run_of_two_budgets_has_one_curve():
    results, _ = results_of(2)
    for row in results.rows:
        row.run = f"{row.method} of seed {row.seed}"
    results.rows += [replace(row, budget="total") for row in results.rows]
    assert {curve.budget for curve in depth.curves(results)} == {"steps"}


def test_fewer_than_five_seeds_test_no_trend():
    few, enough = (next(iter(depth.curves(results_of(seeds)[0]))) for seeds in (4, 5))
    assert few.trend.p is None and few.trend.low < few.trend.high
    assert enough.trend.p is not None


def test_sections_show_the_untrained_model_beside_and_are_empty_without_such_rows(tmp_path):
    results, _ = results_of(5)
    text = "\n".join(depth_report.sections(results, tmp_path / "figures"))
    assert "### Depth, small, steps, dense" in text and "figures/depth-small-steps-dense.svg" in text
    assert f"{LOSS}: untrained" in text and " 5.5 |" in text
    assert (tmp_path / "figures" / "depth-small-steps-dense.svg").stat().st_size > 5000
    results.rows = [row for row in results.rows if not depth.is_intervention(row)]
    assert depth_report.sections(results, tmp_path) == []
