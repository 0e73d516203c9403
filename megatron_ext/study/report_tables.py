"""The tables of a study's report, as Markdown."""

from collections.abc import Sequence

import pandas as pd

from megatron_ext.analysis import beside_paper, fit
from megatron_ext.analysis.results import Results, Row
from megatron_ext.analysis.synergy import TASKS, Comparison
from megatron_ext.analysis.tables import gains, markdown, percent

BUDGETS = {
    "tokens": "Equal tokens",
    "steps": "Equal tokens and steps",
    "total": "Equal tokens in all",
    "flops": "Equal FLOPs",
}
LOSSES = tuple(f"{task} loss" for task in TASKS)


def trained(rows: list[Row]) -> str:
    """A row per size and method: what it cost and what it reached, mean and standard deviation over its seeds."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    results = pd.DataFrame([vars(row) | dict.fromkeys(metrics) | row.metrics for row in rows])
    results[metrics] = results[metrics].astype(float)
    lines = []
    keys = ["size", "method", "task", "evaluated_as"]
    for (size, method, task, evaluated_as), group in results.groupby(keys, sort=False, dropna=False):
        lines.append(
            {
                "method, trained on": f"{method}, {task}",
                "size": size,
                "evaluated as": evaluated_as,
                "seeds": ", ".join(map(str, group["seed"])),
                "iterations": str(group["iterations"].iloc[0]),
                "tokens": f"{group['tokens'].mean() / 1e6:.3g} M",
                "FLOPs": f"{group['flops'].mean():.3g}",
                "FLOPs / dense": f"{group['flops_ratio'].mean():.3f}",
            }
            | {metric: _mean(group[metric].dropna()) for metric in metrics}
        )
    table = pd.DataFrame(lines)
    return markdown(table if table["evaluated as"].nunique() > 1 else table.drop(columns="evaluated as"))


def _mean(values: pd.Series) -> str:
    if values.empty:
        return "-"
    return f"{values.mean():.4g}" + (f" ± {values.std():.2g}" if len(values) > 1 else "")


def costs(costs: Sequence[Comparison], roles: str | None) -> list[str]:
    """A table for each size: how much better or worse than dense on the same tasks."""
    parts = ["### Against dense, trained on the same tasks" + (f", evaluated as {roles}" if roles else "")]
    for size in dict.fromkeys(c.size for c in costs):
        parts += [f"Size {size}:", markdown(gains([c for c in costs if c.size == size]))]
    return parts if len(parts) > 1 else []


def headline_metrics(comparisons: Sequence[Comparison]) -> list[str]:
    """What is shown over size: each task's average over benchmarks, and its loss."""
    averages = [f"mean {task}" for task in TASKS if any(c.average(task) for c in comparisons)]
    return averages + [name for name in LOSSES if any(c.effect(name) for c in comparisons)]


def over_sizes(comparisons: Sequence[Comparison]) -> list[str]:
    """A table per headline metric: gains and synergy losses, methods down, sizes across."""
    sizes = list(dict.fromkeys(c.size for c in comparisons))
    if len(sizes) < 2:
        return []
    parts = []
    for metric in headline_metrics(comparisons):
        lines = []
        for method in dict.fromkeys(c.method for c in comparisons):
            by_size = {c.size: c for c in comparisons if c.method == method}
            ratios = [c.flops_ratio for c in by_size.values() if c.flops_ratio is not None]
            flops = " .. ".join(dict.fromkeys(f"{x:.2f}" for x in (max(ratios), min(ratios)))) if ratios else "-"
            lines.append({"method": method, "FLOPs": flops} | _gains_and_losses(by_size, metric, sizes, sizes))
        parts += [f"{metric[0].upper()}{metric[1:]}:", markdown(pd.DataFrame(lines))]
    return parts


def fits(lines: dict[tuple[str, str], fit.Fit]) -> str:
    """The lines through synergy losses, by method and metric."""
    table = pd.DataFrame(
        {
            "method": method,
            "synergy loss of": metric,
            "a": percent(line.a, "pp"),
            "b of a + b ln N": percent(line.b, "pp"),
            "sizes": len(line.parameters),
            "rms residual": f"{100 * line.residual:.1f} pp",
        }
        for (method, metric), line in lines.items()
    )
    return markdown(table)


def over_budgets(budgets: Sequence[str], comparisons: Sequence[Comparison]) -> list[str]:
    """Gains and synergy losses under each budget, for methods trained under several."""
    lines = []
    for size, method, roles in dict.fromkeys((c.size, c.method, c.evaluated_as) for c in comparisons):
        selected = [c for c in comparisons if (c.size, c.method, c.evaluated_as) == (size, method, roles)]
        by_budget = {c.budget: c for c in selected}
        if len(by_budget) < 2:
            continue
        names = [BUDGETS[budget].lower() for budget in budgets]
        for metric in headline_metrics(list(by_budget.values())):
            lines.append(
                {"method": method, "size": size, "evaluated as": roles or "trained", "metric": metric}
                | _gains_and_losses(by_budget, metric, budgets, names)
            )
    return ["## Comparison of budgets", markdown(pd.DataFrame(lines))] if lines else []


def beside_the_paper(results: Results) -> list[str]:
    """The paper's tables with ours beside, for methods that have its names."""
    parts = [f"{title}:\n\n{markdown(table)}" for title, table in beside_paper.tables(results)]
    note = (
        "In brackets what a method changes against dense, positive where it is better. Figures of another size, other "
        "data or other benchmarks compare in this alone."
    )
    return ["## Beside arXiv 2606.01503", *parts, note] if parts else []


def _gains_and_losses(
    comparisons: dict[str | None, Comparison], metric: str, keys: Sequence[str | None], names: Sequence[str | None]
) -> dict[str, str]:
    """A gain and a synergy loss for each of ``keys``, by column; columns are called by ``names``."""
    effects = [c.of(metric) if (c := comparisons.get(key)) else None for key in keys]
    return {f"gain, {name}": percent(effect and effect.gain) for name, effect in zip(names, effects)} | {
        f"synergy loss, {name}": percent(effect and effect.loss, "pp") for name, effect in zip(names, effects)
    }
