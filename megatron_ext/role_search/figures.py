"""The figures of a finished search, as plain data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import fmean

import numpy as np
import pandas as pd

from megatron_ext.analysis import statistics
from megatron_ext.analysis.synergy import PRIMARY
from megatron_ext.role_search import measure, training
from megatron_ext.role_search.costs import ROWS
from megatron_ext.role_search.space import distance, key
from megatron_ext.role_search.stages import ARMS, Search, of_arm
from megatron_ext.role_search.training import UNCHANGED, Trainings
from megatron_ext.routing.roles import task_and_modality

STAGES = {"predicted": "predicted", "measured together": "measured"}
"""The stages that order tables before any is trained, and their figures' keys."""
FEWEST = 3
"""Fewest tables for a rank correlation."""


def collect(search: Search) -> dict:
    """What ``OUT/search.json`` has.

    Keys: ``settings``; ``unchanged`` (losses of the plan without changes with the drawn model); ``changes``, one entry
    per single change; ``tables``, by name, with costs, predicted and measured changes of loss and the score in each
    rung; ``orders``, of each stage the range of the figure that orders tables; ``rank_correlations`` of each two
    consecutive stages; ``distances`` between those trained; ``best``, the best table of each arm; ``fresh``, log ratios
    on fresh seeds; ``spent``, FLOPs and numbers of tables and runs.
    """
    base = search.losses[key(search.space.own)]
    best = {arm: training.best(search.rungs[-1], of_arm(arm, search.rungs[-1].results()), 1)[0] for arm in ARMS}
    tables = _tables(search)
    orders = _orders(tables, len(search.rungs))
    return {
        "settings": asdict(search.settings),
        "unchanged": {
            "cost": search.costs.ratio(search.space.own),
            "losses": {task: sum(sums) / sum(base.tokens[task]) for task, sums in base.sums.items()},
        },
        "changes": _changes(search),
        "tables": tables,
        "orders": {name: _by_arm(values, _range) for name, values in orders.items()},
        "rank_correlations": {
            f"{first} / {second}": _by_arm(orders[first], rank_correlation, orders[second])
            for first, second in zip(orders, list(orders)[1:])
        },
        "distances": {arm: _distances(search, arm) for arm in ARMS},
        "best": best,
        "fresh": _fresh(search.fresh, best),
        "spent": _spent(search),
    }


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, with mean ranks for ties; None for fewer than three pairs, or ties alone."""
    ranks = [pd.Series(values).rank().to_numpy() for values in (first, second)]
    if len(first) < FEWEST or min(map(np.ptp, ranks)) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _changes(search: Search) -> list[dict]:
    base, changes = search.losses[key(search.space.own)], []
    for (layer, index, role), losses in measure.single_changes(search.space, search.losses).items():
        task, modality = (value.name.lower() for value in task_and_modality(index))
        table = search.space.changed((layer, index, role))
        ratios = losses.log_ratio(base)
        changes.append(
            {
                "layer": layer,
                "task": task,
                "modality": modality,
                "role": role.name.lower(),
                "saves": search.costs.ratio(search.space.own) - search.costs.ratio(table),
                "change": {name: change for name, (change, _) in ratios.items()},
                "standard_error": {name: _finite(error) for name, (_, error) in ratios.items()},
            }
        )
    return changes


def _tables(search: Search) -> dict[str, dict]:
    base, tables = search.losses[key(search.space.own)], {}
    for name, table in search.tables.items():
        losses = search.losses[key(table)]
        tables[name] = {
            "plan": training.plan_section(search.settings, search.space, table),
            "cost": search.costs.ratio(table),
            "predicted": search.predicted[name],
            "measured": losses.worse(base),
            "rungs": [],
        }
    for rung in search.rungs:
        results = rung.results()
        for name, score in training.scores(rung).items():
            (result,) = results[name].values()
            tables[name]["rungs"].append({"score": _finite(score), **result["losses"]})
    return tables


def _orders(tables: Mapping[str, dict], rungs: int) -> dict[str, dict[str, float]]:
    """For each stage that orders tables, the figure of every table that has one."""
    orders = {stage: {name: table[key] for name, table in tables.items()} for stage, key in STAGES.items()}
    for number in range(rungs):
        scores = {n: t["rungs"][number]["score"] for n, t in tables.items() if number < len(t["rungs"])}
        orders[f"rung {number + 1}"] = {name: score for name, score in scores.items() if score is not None}
    return orders


def _by_arm(first: Mapping[str, float], function: Callable, *others: Mapping[str, float]) -> dict:
    """A function of the figures of each arm's tables, and of all, that are in every mapping."""
    common = [name for name in first if all(name in other for other in others)]
    names = {arm: of_arm(arm, common) for arm in ARMS} | {"all": common}
    return {
        arm: function(*([values[n] for n in chosen] for values in (first, *others))) for arm, chosen in names.items()
    }


def _range(values: Sequence[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None


def _distances(search: Search, arm: str) -> dict[str, float] | None:
    """The mean and the least number of entries in which two tables of an arm differ, of those trained."""
    tables = [search.tables[name] for name in of_arm(arm, search.rungs[0].results())]
    distances = [distance(*pair) for pair in combinations(tables, 2)]
    return {"mean": fmean(distances), "least": min(distances)} if distances else None


def _fresh(trainings: Trainings, best: Mapping[str, str]) -> dict:
    """Log ratios of losses on fresh seeds: each arm's best against the plan without changes, and against each other."""
    results = trainings.results()
    names = {arm: results[name] for arm, name in best.items()} | {UNCHANGED: results[UNCHANGED]}
    pairs = [("searched", UNCHANGED), ("random", UNCHANGED), ("searched", "random")]
    comparisons = {}
    for first, second in pairs:
        name = f"{first} / {second}"
        comparisons[name] = {"flops_ratio": _flops_ratio(names[first], names[second])}
        for loss in PRIMARY:
            values = [
                math.log(names[first][s]["losses"][loss] / names[second][s]["losses"][loss]) for s in names[first]
            ]
            comparisons[name][loss] = {
                "log_ratios": values,
                "estimate": asdict(statistics.t_interval(values)),
                "equivalence": asdict(statistics.equivalence(values)),
            }
    # Each kind of test is made several times.
    for test in ("estimate", "equivalence"):
        tests = [comparison[loss][test] for comparison in comparisons.values() for loss in PRIMARY]
        for figures, adjusted in zip(tests, statistics.holm([figures["p"] for figures in tests])):
            figures["holm"] = adjusted
    losses = {n: {s: result["losses"] for s, result in of_seeds.items()} for n, of_seeds in names.items()}
    return {"losses": losses, "comparisons": comparisons}


def _flops_ratio(first: Mapping[int, dict], second: Mapping[int, dict]) -> float:
    """FLOPs of the training, over all seeds."""
    return sum(r["flops"] for r in first.values()) / sum(r["flops"] for r in second.values())


def _spent(search: Search) -> dict:
    """FLOPs and tokens of every part of the search, and how many tables it looked at."""
    drawn = sum(search.drawn.flops.values())
    tables = [*(search.space.changed(change) for change in search.space.single_changes()), *search.tables.values()]
    of_row = sum(map(search.costs.flops, [search.space.own, *tables])) / ROWS
    measuring = of_row * search.settings.drawn.rows
    arms = dict.fromkeys((*ARMS, UNCHANGED), 0)
    for rung in search.rungs:
        for name, flops in rung.flops.items():
            arms[name.partition("-")[0]] += flops
    return {
        "drawn_flops": drawn,
        "measuring_flops": measuring,
        "rungs_flops": arms,
        "fresh_flops": sum(search.fresh.flops.values()),
        "tables_measured": len(search.losses),
        "tables_trained": {arm: len(of_arm(arm, search.rungs[0].results())) for arm in ARMS},
        "runs": 1 + sum(len(t.runs) for t in (*search.rungs, search.fresh)),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
