"""Synergy: the paper's derived figures, reference runs, resampling, fits, tables."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_ext.analysis import fit, results, synergy, tables
from megatron_ext.analysis.bootstrap import Bootstrap, interval
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
    assert {e.metric: round(100 * e.gain[0], 1) for e in paper[method].effects} == PAPER[method]


def test_synergy_loss_is_what_dense_gains_more(paper):
    for method, gains in PAPER.items():
        for metric, gain in gains.items():
            loss = 100 * paper[method].effect(metric).loss[0]
            assert loss == pytest.approx(PAPER["dense"][metric] - gain, abs=0.11)
    understanding = [100 * paper["HiMix-HMGen (Share All)"].effect(m).loss[0] for m in list(PAPER["dense"])[:5]]
    average = paper["HiMix-HMGen (Share All)"].average("understanding").loss[0]
    assert 100 * average == pytest.approx(np.mean(understanding)) == pytest.approx(23.65, abs=0.05)


def test_the_cost_of_a_method_is_relative_to_dense_on_the_same_tasks():
    costs = {c.method: c for c in synergy.against_dense(results.published())}
    assert not [name for name in costs if name.startswith("dense")]
    himix, hmgen = costs["HiMix, understanding"], costs["HMGen, 3 shallow layers, generation"]
    assert himix.effect("GQA").gain[0] == pytest.approx((49.92 - 52.86) / 52.86)
    assert hmgen.effect("MJHQ-FID").gain[0] == pytest.approx((17.45 - 12.16) / 17.45)  # lower is better
    share_all = costs["HiMix-HMGen (Share All), unified"]
    assert share_all.effect("GQA").gain[0] == pytest.approx((33.0 - 56.0) / 56.0)
    assert [e.metric for e in hmgen.effects] == ["MJHQ-FID"] and share_all.average("understanding")


def test_costs_are_over_the_seeds_and_sizes_that_dense_has_too():
    rows = [
        *(row("dense", "unified", "dense", value, seed, "a") for seed, value in ((1, 10.0), (2, 20.0))),
        *(row("fast", "unified", "fast", value, seed, "a") for seed, value in ((2, 30.0), (3, 99.0))),
        row("fast", "unified", "fast", 1.0, 1, "b"),
    ]
    (cost,) = synergy.against_dense(gqa(*rows), Bootstrap(50))
    assert (cost.size, cost.effects[0].seeds) == ("a", (2,)) and cost.effects[0].gain[0] == 0.5


def row(method, task, partner_group, value, seed=None, size=None, run=None, metric="GQA") -> Row:
    return Row(method, task, partner_group, {metric: value}, seed=seed, size=size, run=run, parameters=None)


def gqa(*rows: Row) -> Results:
    return Results("a test", {"GQA": Metric("understanding")}, list(rows))


def test_reference_runs_share_a_partner_group_and_seeds_are_averaged_over_those_that_both_have():
    rows = [row("dense", "understanding", ["dense", "half"], 40.0, seed) for seed in (1, 2)]
    rows += [row("fast u", "understanding", "fast", 20.0, seed) for seed in (1, 2, 3)]
    rows += [row("dense", "unified", "dense", 50.0, 1), row("dense", "unified", "dense", 54.0, 2)]
    rows += [row("half", "unified", "half", 30.0, 2), row("fast", "unified", "fast", 10.0, 1)]
    dense, half, fast = synergy.compare(gqa(*rows))
    assert dense.effect("GQA").gain[0] == pytest.approx(0.3) and dense.effect("GQA").seeds == (1, 2)
    assert half.effect("GQA").gain[0] == pytest.approx(-0.25) and half.effect("GQA").seeds == (2,)
    assert half.effect("GQA").loss[0] == pytest.approx(0.35 + 0.25)  # dense's gain for seed 2 alone
    assert fast.effect("GQA").gain[0] == pytest.approx(-0.5)
    assert "fast: nothing is trained on generation alone" in fast.missing


def test_sizes_are_not_compared_with_one_another():
    rows = [
        row("dense", task, "dense", value, size="s") for task, value in (("understanding", 40.0), ("unified", 44.0))
    ]
    large = synergy.compare(gqa(*rows, row("dense", "unified", "dense", 90.0, size="l")))[1]
    assert large.size == "l" and not large.effects


def test_a_gain_over_nothing_is_no_number():
    rows = [row("dense", "understanding", "dense", 0.0), row("dense", "unified", "dense", 5.0)]
    (dense,) = synergy.compare(gqa(*rows))
    assert np.isnan(dense.effect("GQA").gain[0]) and not dense.averages
    assert tables.gains([dense]).values.tolist() == [["dense", "-", "-"]]


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


def test_seeds_are_resampled_together_so_that_what_they_share_cancels():
    noise = {1: 0.0, 2: 10.0, 3: -4.0, 4: 7.0}
    rows = [row("dense", "understanding", "dense", 40 + x, s) for s, x in noise.items()]
    paired = [row("dense", "unified", "dense", 1.5 * (40 + x), s) for s, x in noise.items()]
    own = [row("dense", "unified", "dense", 1.5 * (40 + x), 5 - s) for s, x in noise.items()]
    (same,) = synergy.compare(gqa(*rows, *paired), Bootstrap(100))
    assert np.allclose(same.effect("GQA").gain, 0.5)  # in every replicate
    (other,) = synergy.compare(gqa(*rows, *own), Bootstrap(100))
    low, high = interval(other.effect("GQA").gain)
    assert low < 0.5 < high and other.effect("GQA").gain[0] == pytest.approx(0.5)
    (again,) = synergy.compare(gqa(*rows, *own), Bootstrap(100))
    assert np.array_equal(again.effect("GQA").gain, other.effect("GQA").gain)


def test_one_seed_and_no_questions_give_no_interval():
    rows = [row("dense", "understanding", "dense", 40.0, 1), row("dense", "unified", "dense", 44.0, 1)]
    (dense,) = synergy.compare(gqa(*rows), Bootstrap(50))
    assert interval(dense.effect("GQA").gain) is None


def test_replicates_over_questions_reach_the_gain():
    replicates = np.array([39.0, 40.0, 41.0])
    questions = {("u", None, "GQA"): replicates, ("all", None, "GQA"): replicates * 1.1}
    rows = [row("dense", "understanding", "dense", 40.0, run="u"), row("dense", "unified", "dense", 50.0, run="all")]
    (dense,) = synergy.compare(gqa(*rows), Bootstrap(3, questions=questions))
    assert np.allclose(dense.effect("GQA").gain, [0.25, 0.1, 0.1, 0.1])


def test_a_line_over_sizes_is_recovered_with_its_uncertainty():
    random = np.random.default_rng(0)
    sizes = [10**6, 10**7, 10**8]
    noise = np.concatenate([np.zeros((3, 1)), random.normal(0, 0.01, (3, 500))], axis=1)
    losses = [0.1 + 0.02 * np.log(n) + e for n, e in zip(sizes, noise)]
    line = fit.fit(sizes[::-1], losses[::-1])
    assert line.a[0] == pytest.approx(0.1) and line.b[0] == pytest.approx(0.02)
    assert line.residual == pytest.approx(0, abs=1e-12)
    low, high = interval(line.b)
    spread = 0.01 / (np.log(10) * np.sqrt(2))  # of a slope over three points, known errors
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert fit.fit([10, 10], losses[:2]) is None


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
    assert [line[2] for line in lines if line[0].startswith(("dense", "HiMix"))][:3] == ["+5.9 %", "-33.9 %", "-5.7 %"]
    assert r"HiMix-HMGen (Share All) & 0.56 & -33.9 \% & +3.8 \% &" in files["latex"].read_text()
    records = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    gained = {(r["method"], r["metric"]): r["gain"] for r in records}
    assert float(gained["HiMix-HMGen (Share Partial)", "GQA"]) == pytest.approx((47.05 - 49.92) / 49.92)
    assert len(json.loads(files["json"].read_text())["methods"]) == 3
    assert plot.read_bytes().startswith(b"\x89PNG")
