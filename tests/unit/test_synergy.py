"""Synergy: the paper's derived figures, reference runs, parts of synergy losses, fits, tables."""

import csv
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from megatron_ext.analysis import fit, outcomes, results, synergy, tables
from megatron_ext.analysis.results import Metric, Results, Row
from megatron_ext.errors import UserError
from support.programs import ROOT

# (unified - single) / |single| in percent, worked out by hand from the printed tables.
PAPER = {
    "dense": {"GQA": 5.9, "MME-C": -3.2, "MME-P": 7.7, "POPE-F1": 3.7, "SEED-Img": 4.0, "MJHQ-FID": 9.6},
    "HiMix-HMGen (Share All)": {
        **{"GQA": -33.9, "MME-C": 3.8, "MME-P": -32.6, "POPE-F1": -14.2, "SEED-Img": -23.2, "MJHQ-FID": -3.0}
    },
    "HiMix-HMGen (Share Partial)": {
        **{"GQA": -5.7, "MME-C": 13.5, "MME-P": -13.8, "POPE-F1": -2.8, "SEED-Img": -15.6, "MJHQ-FID": -19.6}
    },
}


@pytest.fixture(scope="module")
def paper():
    return {c.method: c for c in synergy.compare(results.published())}


@pytest.mark.parametrize("method", PAPER)
def test_the_papers_gains_follow_from_its_tables(paper, method):
    assert {e.metric: round(100 * e.gain, 1) for e in paper[method].effects} == PAPER[method]


# Unified cost and partner advantage in log points, worked out by hand from the printed tables.
PAPER_PARTS = {
    "HiMix-HMGen (Share All)": {"GQA": (52.9, -5.7), "SEED-Img": (42.3, -11.9), "MJHQ-FID": (-23.1, 36.1)},
    "HiMix-HMGen (Share Partial)": {"GQA": (17.4, -5.7), "SEED-Img": (32.8, -11.9), "MJHQ-FID": (-8.2, 36.1)},
}


@pytest.mark.parametrize("method", PAPER_PARTS)
def test_a_synergy_loss_is_a_unified_cost_and_a_partner_advantage(paper, method):
    for metric, expected in PAPER_PARTS[method].items():
        effect = paper[method].effect(metric)
        parts = [effect.estimate(quantity).mean for quantity in ("unified_cost", "partner_advantage")]
        assert parts == pytest.approx(expected, abs=0.051)
        loss = paper["dense"].estimate(metric, "synergy").mean - effect.estimate("synergy").mean
        assert sum(parts) == pytest.approx(loss) == pytest.approx(effect.estimate("loss").mean)
    understanding = [paper[method].estimate(m, "loss").mean for m in list(PAPER["dense"])[:5]]
    assert paper[method].estimate("mean understanding", "loss").mean == pytest.approx(np.mean(understanding))
    assert paper["dense"].effect("GQA").unified_cost == {}


def row(method, task, partner_group, value, seed=None, size=None, run=None, metric="GQA") -> Row:
    return Row(method, task, partner_group, {metric: value}, seed=seed, size=size, run=run, parameters=None)


LOSS, ALONE = "understanding loss", "understanding"
METHODS = {"one": 1.2, "two": 1.3}
"""Method -> its loss relative to dense's."""


def gqa(*rows: Row) -> Results:
    return Results("a test", {"GQA": Metric("understanding")}, list(rows))


def test_reference_runs_share_a_partner_group_and_models_are_compared_seed_by_seed():
    rows = [row("dense", "understanding", ["dense", "half"], value, seed) for seed, value in ((1, 40.0), (2, 50.0))]
    rows += [row("fast u", "understanding", "fast", 20.0, seed) for seed in (1, 2, 3)]
    rows += [row("dense", "unified", "dense", 50.0, 1), row("dense", "unified", "dense", 55.0, 2)]
    rows += [row("half", "unified", "half", 25.0, 2), row("fast", "unified", "fast", 10.0, 1)]
    dense, half, fast = synergy.compare(gqa(*rows))
    ratios = {1: 100 * math.log(5 / 4), 2: 100 * math.log(1.1)}
    assert dense.effect("GQA").synergy == pytest.approx(ratios)
    assert dense.effect("GQA").gain == pytest.approx(52.5 / 45 - 1)
    assert half.effect("GQA").unified_cost == pytest.approx({2: 100 * math.log(2.2)})
    assert half.effect("GQA").partner_advantage == {2: 0.0}  # it shares dense's partner run
    assert half.effect("GQA").loss == pytest.approx({2: ratios[2] + 100 * math.log(2)})
    assert fast.effect("GQA").partner_advantage == pytest.approx({1: -100 * math.log(2)})  # as the cost: no other seed
    assert "fast: nothing is trained on generation alone" in fast.missing
    alone = synergy.compare(gqa(*rows[-4:]))[2]
    assert alone.effect("GQA").unified_cost.keys() == {1} and alone.estimate("GQA", "loss") is None


def test_what_a_seed_does_to_all_models_cancels():
    noise = {1: 0.5, 2: 2.0, 3: 0.9, 4: 1.7}
    rows = [row("dense", "understanding", "dense", 40 * x, s) for s, x in noise.items()]
    paired = [row("dense", "unified", "dense", 60 * x, s) for s, x in noise.items()]
    (same,) = synergy.compare(gqa(*rows, *paired))
    assert list(same.effect("GQA").synergy.values()) == pytest.approx([100 * math.log(1.5)] * 4)
    other = [row("dense", "unified", "dense", 60 * x, 5 - s) for s, x in noise.items()]
    estimate = synergy.compare(gqa(*rows, *other))[0].estimate("GQA", "synergy")
    assert estimate.mean == pytest.approx(100 * math.log(1.5)) and estimate.low < 0


def test_figures_that_may_be_0_are_compared_in_points_and_others_need_a_logarithm():
    values = {("dense", "understanding"): -1.0, ("dense", "unified"): 5.0, ("fast", "unified"): 3.0}
    rows = [row(method, task, "dense", value, 1) for (method, task), value in values.items()]
    points = Results("", {"GQA": Metric("understanding", scale="points")}, rows)
    dense, fast = synergy.compare(points)
    assert dense.effect("GQA").synergy == {1: 6.0} and fast.effect("GQA").unified_cost == {1: 2.0}
    assert not dense.averages and tables.parts([dense])["metric"].tolist() == ["GQA (points)"]
    dense, fast = synergy.compare(gqa(*rows))
    left_out = "GQA: left out, -1 of dense (understanding) has no logarithm or is not finite"
    assert not fast.effects and left_out in fast.missing


def test_a_figure_without_a_score_counts_only_where_it_is_compared():
    values = {("dense", "understanding"): 40.0, ("dense", "unified"): 44.0, ("untrained", "unified"): 0.0}
    rows = [row(method, task, [] if method == "untrained" else "dense", x) for (method, task), x in values.items()]
    (dense,) = synergy.compare(gqa(*rows))
    assert dense.effect("GQA").synergy == pytest.approx({None: 100 * math.log(1.1)})
    rows[1].metrics["GQA"] = math.nan
    (dense,) = synergy.compare(gqa(*rows))
    assert not dense.effects and any("nan of dense (unified)" in reason for reason in dense.missing)
    assert Metric("understanding", scale="points").score(math.inf) is None


def test_points_of_depth_curves_are_no_settings():
    rows = [row("dense", task, "dense", value) for task, value in (("understanding", 40.0), ("unified", 44.0))]
    point = Row("dense", "unified", "dense", {"GQA": 9.0}, evaluated_as="himix_from_3")
    (dense,) = synergy.compare(gqa(*rows, point))
    assert dense.evaluated_as is None and dense.effects


def test_sizes_are_not_compared_with_one_another():
    rows = [
        row("dense", task, "dense", value, size="s") for task, value in (("understanding", 40.0), ("unified", 44.0))
    ]
    large = synergy.compare(gqa(*rows, row("dense", "unified", "dense", 90.0, size="l")))[1]
    assert large.size == "l" and not large.effects


def test_methods_with_one_partner_run_count_once_in_a_family_of_tests():
    values = {1: 1.0, 2: 1.02, 3: 0.97}
    rows = [row("dense", task, "dense", v, s, metric=LOSS) for s, v in values.items() for task in ("unified", ALONE)]
    rows += [row("partner", ALONE, "fast", 0.8 * v**2, s, metric=LOSS) for s, v in values.items()]
    rows += [row(m, "unified", "fast", c * v**3, s, metric=LOSS) for m, c in METHODS.items() for s, v in values.items()]
    tested = outcomes.outcomes(synergy.compare(Results("", {LOSS: Metric(ALONE, False, False)}, rows)))
    of = {(o.quantity, o.method): o for o in tested}
    for method in METHODS:
        assert of["partner_advantage", method].p == of["partner_advantage", method].estimate.p
        assert of["partner_advantage", method].verdict == "better"  # a lower loss
        assert of["unified_cost", method].verdict == "worse"
    least = min(of["unified_cost", method].estimate.p for method in METHODS)
    assert min(of["unified_cost", method].p for method in METHODS) == pytest.approx(2 * least)
    uninformative = outcomes.outcomes(synergy.compare(Results("", {LOSS: Metric(ALONE, False, False)}, rows)), [None])
    assert {o.verdict for o in uninformative} == {"uninformative"}


def test_two_reference_runs_of_one_seed_are_refused():
    rows = [row(name, "understanding", "fast", 1.0) for name in ("a", "b")] + [row("c", "unified", "fast", 1.0)]
    with pytest.raises(UserError, match="two rows are understanding alone with the partner_group fast: 'a' and 'b'"):
        synergy.compare(gqa(*rows))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metrics": {"GQA": {"task": "both"}}}, "'metrics.GQA.task' is 'both', must be one of"),
        ({"rows": [{"method": "dense"}]}, r"'rows\[0\]' needs the keys task, partner_group, metrics"),
        (
            {"rows": [{"method": "a", "task": "unified", "partner_group": "a", "metrics": {"POPE": 1}}]},
            r"rows\[0\] has the metric 'POPE', which is not among 'metrics'",
        ),
        (
            {"rows": [{"method": "a", "task": "unified", "partner_group": "a", "metrics": {"GQA": "1"}}]},
            r"rows\[0\].metrics.GQA is '1', must be a number or null",
        ),
    ],
)
def test_a_mistake_in_a_file_of_results_is_named(tmp_path, change, message):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"source": "a test", "metrics": {"GQA": {"task": "understanding"}}} | change))
    with pytest.raises(UserError, match=message) as refusal:
        results.read(file)
    assert str(refusal.value).startswith(f"{file}: ")


def test_a_line_over_sizes_is_that_of_scipy_through_all_seeds():
    random = np.random.default_rng(0)
    sizes = [10**8, 10**6, 10**7]
    values = [10 + 2 * math.log(n) + random.normal(0, 1, seeds) for n, seeds in zip(sizes, (2, 4, 3))]
    line = fit.fit(sizes, values)
    x = np.repeat(np.log(sizes), [len(v) for v in values])
    expected = stats.linregress(x, np.concatenate(values))
    assert (line.a, line.b.mean, line.b.p) == pytest.approx((expected.intercept, expected.slope, expected.pvalue))
    assert line.b.high - line.b.mean == pytest.approx(expected.stderr * stats.t.ppf(0.975, len(x) - 2))
    assert line.parameters == tuple(sorted(sizes)) and fit.fit([10, 10], values[:2]) is None
    exact = fit.fit(sizes[:2], [[1.0], [2.0]])
    assert exact.residual == pytest.approx(0) and exact.b.low is None


def test_the_tool_writes_the_papers_table_in_every_form(tmp_path):
    files = {name: tmp_path / f"synergy.{name}" for name in ("markdown", "latex", "csv", "json")}
    plot = tmp_path / "new" / "gains.png"
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    done = subprocess.run(
        [sys.executable, "tools/synergy.py", *options, "--plot", plot],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == files["markdown"].read_text()
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in done.stdout.splitlines()]
    (of_share_all,) = [line for line in lines if line[:2] == ["GQA", "HiMix-HMGen (Share All)"]]
    assert of_share_all[2:] == ["0.56", "-33.9 %", "-41.4", "+52.9", "-5.7", "+47.2"]
    assert r"GQA & HiMix-HMGen (Share All) & 0.56 & -33.9 \% & -41.4 & +52.9 &" in files["latex"].read_text()
    records = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    of_partial = {r["metric"]: r for r in records if r["method"] == "HiMix-HMGen (Share Partial)"}["GQA"]
    assert float(of_partial["gain"]) == pytest.approx((47.05 - 49.92) / 49.92)
    assert float(of_partial["unified_cost"]) == pytest.approx(100 * math.log(56 / 47.05))
    assert len(json.loads(files["json"].read_text())["methods"]) == 3
    assert plot.read_bytes().startswith(b"\x89PNG")
