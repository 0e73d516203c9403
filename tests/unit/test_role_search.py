"""The search for roles: exact costs, the knapsack against brute force, tables and their files, figures."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from scipy.stats import spearmanr

from megatron_ext import config_file
from megatron_ext.analysis.synergy import PRIMARY
from megatron_ext.config import ModelConfig, PlanConfig, RoleChoice
from megatron_ext.errors import UserError
from megatron_ext.role_search import figures, knapsack, measure, settings, training
from megatron_ext.role_search.costs import Costs
from megatron_ext.role_search.measure import Losses
from megatron_ext.role_search.settings import RoleSearch, Rung
from megatron_ext.role_search.space import WINDOW, Space, distance, key, spread
from megatron_ext.role_search.stages import Search, best_tables
from megatron_ext.role_search.training import plan_section, score
from megatron_ext.routing.document_mix import mix_batch
from megatron_ext.routing.flops import count, forward_flops, lossless_dense
from megatron_ext.routing.plan import Plan

MODEL = ModelConfig(3, 16, 4, 2, 24)
BATCH = mix_batch("understanding: 30 image, 6 text, 3 answer; generation: 9 text, 30 image; text: 12 text")
VOCABULARY = 50


@pytest.fixture
def search(tmp_path) -> RoleSearch:
    """A search over a model of three layers, with deltas for images."""
    base = {"model": {"num_layers": 3, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base | {"model": base["model"] | {"num_query_groups": 2}}))
    plan = {"preset": "dense_lossless", "projections": {"kind": "delta", "rank": 2}}
    return RoleSearch("test", str(tmp_path / "out"), [str(tmp_path / "base.yaml")], plan=plan)


@pytest.fixture
def space(search) -> Space:
    return Space.of(search)


@pytest.fixture
def costs(space) -> Costs:
    return Costs.of(BATCH, MODEL, VOCABULARY, space.plan, space.choices)


def flops(plan: Plan) -> int:
    return forward_flops(MODEL, VOCABULARY, plan, count(BATCH, plan))


def every_table(space: Space) -> list:
    options = [[None, *roles] for roles in space.choices.values()]
    return [
        space.changed(*((*place, role) for place, role in zip(space.choices, roles) if role is not None))
        for roles in itertools.product(*options)
    ]


def test_the_knapsack_finds_what_brute_force_finds():
    chance = random.Random(0)
    for case in range(60):
        # Few different costs, as layers have; values below 0, too.
        groups = [
            [(chance.randrange(6), chance.uniform(-1, 2)) for _ in range(chance.randrange(1, 5))]
            for _ in range(chance.randrange(1, 6))
        ]
        budget, wanted = chance.randrange(20), chance.choice([1, 3, 24])
        fitting = [
            (sum(group[pick][1] for group, pick in zip(groups, picks)), picks)
            for picks in itertools.product(*(range(len(group)) for group in groups))
            if sum(group[pick][0] for group, pick in zip(groups, picks)) <= budget
        ]
        expected = [list(picks) for _, picks in sorted(fitting)[:wanted]]
        assert knapsack.best(groups, budget, wanted) == expected, case


def test_the_cost_of_a_table_is_that_of_its_plan(space, costs):
    tables = every_table(space)
    assert len(tables) == 3 * 3 * 2 * 2 * 2 * 2 * 2  # the last layer may only skip understanding's images
    for table in random.Random(0).sample(tables, 40):
        assert costs.flops(table) == flops(space.plan_of(table))
    assert costs.base == flops(lossless_dense(space.plan)) < costs.flops(space.own)  # low-rank deltas cost something


def test_a_single_change_saves_exactly_the_difference_in_flops(space, costs):
    changes = list(space.single_changes())
    assert len(changes) == 9
    for change in changes:
        saved = flops(space.plan) - flops(space.plan_of(space.changed(change)))
        assert saved == costs.flops(space.own) - costs.flops(space.changed(change)) > 0


def test_the_best_tables_are_those_of_brute_force(space, costs):
    chance = random.Random(1)
    changes = {change: max(0, chance.gauss(0.02, 0.03)) for change in space.single_changes()}
    assert list(changes.values()).count(0) > 1

    def value(table) -> float:
        return sum(changes[change] for change in space.changes(table))

    fitting = [table for table in every_table(space) if costs.ratio(table) <= 0.8]
    # Of equal sums the costlier is better; the cost is that of a random table.
    expected = sorted(fitting, key=lambda t: (round(value(t), 9), -costs.flops(t)))[:60]
    expected = [table for table in expected if costs.ratio(table) >= 0.8 - WINDOW]
    found = best_tables(space, costs, changes, 0.8, 60)
    assert [value(t) for t in found] == pytest.approx([value(t) for t in expected], abs=1e-5)
    assert costs.flops(found[0]) == costs.flops(expected[0])
    assert len(set(found)) == len(expected) > 5


def test_costs_are_counted_once_for_the_same_data_and_plan(tmp_path, search, space, costs, monkeypatch):
    monkeypatch.setattr(Costs, "of_training_data", lambda *_: costs)
    assert Costs.kept(tmp_path / "costs.json", space.config, space.plan, space.choices) == costs
    monkeypatch.setattr(Costs, "of_training_data", lambda *_: pytest.fail("counted again"))
    assert Costs.kept(tmp_path / "costs.json", space.config, space.plan, space.choices) == costs
    search.choices = [RoleChoice("all", "understanding", "image", ["skip"])]
    with pytest.raises(pytest.fail.Exception, match="counted again"):
        Costs.kept(tmp_path / "costs.json", space.config, space.plan, Space.of(search).choices)


def test_tables_that_are_spread_are_the_first_that_differ_in_enough_entries(space):
    tables = random.Random(3).sample(every_table(space), 100)

    chosen = spread(tables, 12, 4)
    assert len(set(chosen)) == 12
    apart = [t for n, t in enumerate(chosen) if all(distance(t, other) >= 4 for other in chosen[:n])]
    assert chosen[: len(apart)] == apart and all(
        any(distance(table, other) < 4 for other in apart) for table in tables if table not in apart
    )
    assert len(apart) < 12 and min(distance(*pair) for pair in itertools.combinations(chosen, 2)) == 3
    assert spread(tables[:3], 5, 9) == tables[:3]


def test_the_first_rung_trains_the_drawn_model_under_the_candidates_that_measure_best(
    search, space, costs, monkeypatch
):
    """With random losses for a stand-in of the model."""
    search.cost, search.candidates, search.distance, search.rungs = 0.8, 12, 2, [Rung(3, 100)]

    def losses(table) -> Losses:
        chance = random.Random(key(table))
        sums = {task: [chance.uniform(7, 10)] for task in ("understanding", "generation")}
        return Losses(sums, {task: [1.0] for task in sums})

    of_tables = []
    folder = search.output + "/drawn"
    monkeypatch.setattr(Costs, "kept", lambda *_: costs)
    monkeypatch.setattr(measure, "missing", lambda *_: [])
    monkeypatch.setattr(measure, "measure", lambda *_: None)
    monkeypatch.setattr(measure, "measured", lambda _, tables: {name: losses(t) for name, t in tables.items()})
    monkeypatch.setattr(training, "drawn_model", lambda *_: SimpleNamespace(runs=[SimpleNamespace(folder=folder)]))
    monkeypatch.setattr(training, "of_tables", lambda *arguments: of_tables.append(arguments))
    whole = Search.of(search)
    stages = whole.stages()
    next(stages), next(stages)

    base = losses(space.own)
    for change, of_tasks in whole.changes().items():
        ratios = losses(space.changed(change)).log_ratio(base)
        assert of_tasks == {task: max(0, ratio) for task, (ratio, _) in ratios.items()}
    ((_, _, name, tables, tokens, seeds, start),) = of_tables
    assert (name, tokens, seeds, start) == ("rung1", 100, [1], folder)
    searched = [table for name, table in tables.items() if name.startswith("searched")]
    candidates = [table for name, table in whole.tables.items() if name.startswith("searched")]
    assert len(candidates) == 12 and len(tables) == 6
    ordered = sorted(candidates, key=lambda table: losses(table).worse(base))
    assert searched == spread(ordered, 3, 2) != candidates[:3]
    assert all(distance(*pair) >= 2 for pair in itertools.combinations(searched, 2))
    assert all(0.77 <= costs.ratio(table) <= 0.8 for table in tables.values())


def test_the_task_that_is_worse_orders_tables():
    def losses(understanding: float, generation: float) -> dict:
        return {"losses": {"understanding loss": understanding, "generation loss": generation}}

    base, even, lopsided = losses(2, 1), losses(2.1, 1.1), losses(1.1, 1.2)  # the second has the smaller sum of logs
    assert score(even, base) == pytest.approx(math.log(1.1))
    assert score(lopsided, base) == pytest.approx(math.log(1.2))
    assert score(losses(math.nan, 1), base) == math.inf
    tokens = {"understanding": [1.0, 1.0], "generation": [1.0, 1.0]}
    base = Losses({"understanding": [2, 2], "generation": [1, 1]}, tokens)
    changed = Losses({"understanding": [1, 1], "generation": [1, 1.4]}, tokens)
    assert changed.worse(base) == pytest.approx(math.log(1.2))


def test_a_table_written_as_a_plan_reads_as_the_same_table(search, space, costs):
    tables = random.Random(2).sample(every_table(space), 30)
    for table in tables:
        plan = config_file.from_tree(PlanConfig, plan_section(search, space, table))
        assert Plan.of(plan, 3).roles == table
        assert Plan.of(plan, 3).projections == space.plan.projections


def test_random_tables_are_different_and_of_the_cost_that_is_asked(space, costs):
    tables = space.random_tables(5, costs, 0.8, seed=1, first=8)
    assert len(set(tables)) == 5 and all(0.77 <= costs.ratio(table) <= 0.8 for table in tables)
    assert tables == space.random_tables(5, costs, 0.8, seed=1, first=8)


def test_log_ratios_have_the_standard_error_of_a_mean():
    tokens = np.full(50, 20.0)
    base = np.full(50, 40.0)
    own = 41 + np.random.default_rng(0).standard_normal(50)
    losses = (Losses({"generation": list(sums)}, {"generation": list(tokens)}) for sums in (own, base))
    ((ratio, error),) = next(losses).log_ratio(next(losses)).values()
    assert ratio == pytest.approx(math.log(own.mean() / 40))
    # By the delta method, since the base does not vary.
    assert error == pytest.approx(own.std(ddof=1) / math.sqrt(50) / own.mean(), rel=0.01)


def test_rank_correlations_are_those_of_scipy():
    first, second = [1.0, 3.0, 2.0, 3.0, 9.0], [2.0, 2.0, 1.0, 5.0, 4.0]
    assert figures.rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert figures.rank_correlation(first[:2], second[:2]) is None
    assert figures.rank_correlation(first, [1.0] * 5) is None


def test_six_intervals_are_shown_so_the_smallest_p_is_multiplied_by_six():
    def results(*log_losses: float) -> dict:
        losses = [{"understanding loss": math.exp(log), "generation loss": 1 + log**2} for log in log_losses]
        return {seed: {"flops": 1, "losses": of_seed} for seed, of_seed in enumerate(losses)}

    names = {
        "unchanged": results(0, 0.01, 0),
        "searched-1": results(0.9, 0.92, 0.9),
        "random-1": results(0.8, 0.9, 0.7),
    }
    fresh = figures._fresh(SimpleNamespace(results=lambda: names), {"searched": "searched-1", "random": "random-1"})
    shown = [c[loss]["estimate"] for c in fresh["comparisons"].values() for loss in PRIMARY]
    assert len(shown) == 6
    (first, second, *_) = sorted(shown, key=lambda estimate: estimate["p"])
    assert first["holm"] == pytest.approx(6 * first["p"]) and second["holm"] == pytest.approx(5 * second["p"])


@pytest.mark.parametrize(
    "change, named",
    [
        ({"cost": 1.5}, "'cost' is 1.5"),
        ({"rungs": [{"tables": 2, "tokens": 10}, {"tables": 2, "tokens": 20}]}, r"'rungs\[1\].tables' is 2"),
        ({"report": {"seeds": [1, 2]}}, r"'report.seeds' is \[1, 2\]; .* not 'seed' \(1\)"),
        ({"drawn": {"rows": 0}}, "'drawn.rows' is 0"),
        ({"candidates": 23}, r"'candidates' is 23, must be at least 'rungs\[0\].tables' \(24\)"),
    ],
)
def test_an_impossible_search_is_refused_by_name(tmp_path, change, named):
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump({"name": "x", "output": "o", "base": ["b.yaml"]} | change))
    with pytest.raises(UserError, match=f"search.yaml: {named}"):
        settings.read(file)


def test_choices_that_are_not_legal_are_refused_by_name(search):
    search.choices = [RoleChoice("3", "generation", "image", ["skip"])]
    with pytest.raises(UserError, match=r"'choices\[0\].layers' names layer 3"):
        Space.of(search)
    search.choices = [RoleChoice("2", "understanding", "image", ["kv_only"])]
    with pytest.raises(UserError, match="allow no role but those of 'plan'"):
        Space.of(search)
