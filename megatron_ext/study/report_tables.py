"""The tables of a study's report, as Markdown."""

from collections.abc import Sequence

import numpy as np

from megatron_ext.analysis import fit
from megatron_ext.analysis.results import Row
from megatron_ext.analysis.synergy import TASKS, Comparison
from megatron_ext.analysis.tables import Table, gains, percent

BUDGETS = {
    "tokens": "Equal tokens",
    "steps": "Equal tokens and steps",
    "total": "Equal tokens in all",
    "flops": "Equal FLOPs",
}
LOSSES = tuple(f"{task} loss" for task in TASKS)


def trained(budget: str, rows: list[Row]) -> Table:
    """A row per size and method: what it cost and what it reached, mean and standard deviation over its seeds."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    roles = len({row.evaluated_as for row in rows}) > 1
    lines = []
    for key in dict.fromkeys((row.size, row.method, row.task, row.evaluated_as) for row in rows):
        mine = [row for row in rows if (row.size, row.method, row.task, row.evaluated_as) == key]
        size, method, task, evaluated_as = key
        lines.append(
            [
                f"{method}, {task}",
                size,
                *([evaluated_as] if roles else []),
                ", ".join(str(row.seed) for row in mine),
                str(mine[0].iterations),
                f"{np.mean([row.tokens for row in mine]) / 1e6:.3g} M",
                f"{np.mean([row.flops for row in mine]):.3g}",
                f"{np.mean([row.flops_ratio for row in mine]):.3f}",
                *(_mean([row.metrics[m] for row in mine if row.metrics.get(m) is not None]) for m in metrics),
            ]
        )
    head = ["method, trained on", "size", *(["evaluated as"] if roles else []), "seeds", "iterations", "tokens"]
    return Table(BUDGETS[budget], [*head, "FLOPs", "FLOPs / dense", *metrics], lines)


def _mean(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{np.mean(values):.4g}" + (f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else "")


def costs(costs: Sequence[Comparison], roles: str | None) -> list[str]:
    """A table for each size: how much better or worse than dense on the same tasks."""
    parts = ["### Against dense, trained on the same tasks" + (f", evaluated as {roles}" if roles else "")]
    for size in dict.fromkeys(c.size for c in costs):
        parts += [f"Size {size}:", gains([c for c in costs if c.size == size]).markdown()]
    return parts if len(parts) > 1 else []


def scales(comparisons: Sequence[Comparison]) -> list[str]:
    """What is shown over size: each task's average over benchmarks, and its loss."""
    averages = [f"mean {task}" for task in TASKS if any(c.average(task) for c in comparisons)]
    return averages + [name for name in LOSSES if any(c.effect(name) for c in comparisons)]


def over_sizes(comparisons: Sequence[Comparison]) -> list[str]:
    """A table for each thing that is shown over size: gains and synergy losses, methods down, sizes across."""
    sizes = list(dict.fromkeys(c.size for c in comparisons))
    if len(sizes) < 2:
        return []
    parts = []
    for what in scales(comparisons):
        rows = []
        for method in dict.fromkeys(c.method for c in comparisons):
            mine = {c.size: c for c in comparisons if c.method == method}
            found = [c.of(what) if (c := mine.get(size)) else None for size in sizes]
            ratios = [c.flops_ratio for c in mine.values() if c.flops_ratio is not None]
            rows.append(
                [
                    method,
                    " .. ".join(dict.fromkeys(f"{x:.2f}" for x in (max(ratios), min(ratios)))) if ratios else "-",
                    *(percent(effect and effect.gain) for effect in found),
                    *(percent(effect and effect.loss, "pp") for effect in found),
                ]
            )
        head = [f"{name}, {size}" for name in ("gain", "synergy loss") for size in sizes]
        parts += [f"{what[0].upper()}{what[1:]}:", Table("", ["method", "FLOPs", *head], rows).markdown()]
    return parts


def fit_table(lines: dict[tuple[str, str], fit.Fit]) -> Table:
    """Lines through synergy losses, by method and what is lost."""
    rows = [
        [
            method,
            what,
            percent(line.a, "pp"),
            percent(line.b, "pp"),
            str(len(line.parameters)),
            f"{100 * line.residual:.1f} pp",
        ]
        for (method, what), line in lines.items()
    ]
    return Table("", ["method", "synergy loss of", "a", "b of a + b ln N", "sizes", "rms residual"], rows)


def beside_each_other(budgets: Sequence[str], comparisons: Sequence[Comparison]) -> list[str]:
    """Gains and synergy losses under each budget."""
    rows = []
    keys = dict.fromkeys((c.size, c.method, c.evaluated_as) for c in comparisons)
    for key in keys:
        mine = {c.budget: c for c in comparisons if (c.size, c.method, c.evaluated_as) == key}
        if len(mine) < 2:
            continue
        for what in scales(list(mine.values())):
            found = [c.of(what) if (c := mine.get(b)) else None for b in budgets]
            gains = [percent(effect and effect.gain) for effect in found]
            losses = [percent(effect and effect.loss, "pp") for effect in found]
            rows.append([key[1], key[0], key[2] or "trained", what, *gains, *losses])
    if not rows:
        return []
    head = ["method", "size", "evaluated as", "metric"]
    head += [f"{what}, {BUDGETS[b].lower()}" for what in ("gain", "synergy loss") for b in budgets]
    return ["## Budgets beside each other", Table("", head, rows).markdown()]
