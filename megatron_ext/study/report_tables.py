"""The tables of a study's report, as Markdown."""

from collections import defaultdict
from collections.abc import Sequence

import pandas as pd

from megatron_ext.analysis import beside_paper, fit, tables
from megatron_ext.analysis.gate import Gate
from megatron_ext.analysis.hypotheses import Decision
from megatron_ext.analysis.results import Results, Row
from megatron_ext.analysis.synergy import PRIMARY, QUANTITIES, TASKS, Comparison
from megatron_ext.analysis.tables import markdown, p_value, signed

BUDGETS = {
    "tokens": "Equal tokens",
    "steps": "Equal tokens and steps",
    "total": "Equal tokens in all",
    "flops": "Equal FLOPs",
}


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
                "evaluated as": "trained" if pd.isna(evaluated_as) else evaluated_as,
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


def headline_metrics(comparisons: Sequence[Comparison]) -> list[str]:
    """What is shown over sizes and budgets: the primary outcomes, figures in points, each task's average."""
    effects = {e.metric: e for c in comparisons for e in c.effects}
    points = [name for name, effect in effects.items() if effect.scale == "points" and effect.counts]
    averages = [f"mean {task}" for task in TASKS if any(c.average(task) for c in comparisons)]
    return [*(name for name in PRIMARY if name in effects), *points, *averages]


def over_sizes(comparisons: Sequence[Comparison]) -> list[str]:
    """The headline metrics of all sizes in one table, the sizes of a method below one another."""
    if len({c.size for c in comparisons}) < 2:
        return []
    methods = list(dict.fromkeys(c.method for c in comparisons))
    by_method = sorted(comparisons, key=lambda c: methods.index(c.method))
    table = tables.parts(by_method, headline_metrics(comparisons))
    return [] if table.empty else [f"{tables.PARTS}, all sizes:", markdown(table)]


def fits(lines: dict[tuple[str, str, str], fit.Fit]) -> str:
    """The lines over size, by method, metric and quantity."""
    table = pd.DataFrame(
        {
            "method": method,
            "metric": metric,
            "quantity": QUANTITIES[quantity],
            "b of a + b ln N": signed(line.b),
            "p of b = 0": p_value(line.b.p),
            "sizes": len(line.parameters),
            "values": line.b.n,
            "rms residual": f"{line.residual:.1f}",
        }
        for (method, metric, quantity), line in lines.items()
    )
    return markdown(table)


def over_budgets(comparisons: Sequence[Comparison]) -> list[str]:
    """The headline metrics under each budget, for methods trained under several."""
    budgets = defaultdict(set)
    for c in comparisons:
        if c.effects:
            budgets[c.size, c.method, c.evaluated_as].add(c.budget)
    several = [c for c in comparisons if len(budgets[c.size, c.method, c.evaluated_as]) > 1]
    table = tables.parts(several, headline_metrics(several))
    return [] if table.empty else ["## Over budgets", markdown(table)]


def gates(decided: Sequence[Gate]) -> list[str]:
    """What dense reached at each size, and had to."""
    if not decided:
        return []
    lines = [
        {"size": gate.size, "metric": metric}
        | {"dense": "-" if (mean := gate.reached[metric]) is None else f"{mean:.1f}", "least": f"{least:g}"}
        | {"size is": "informative" if gate.passed else "uninformative"}
        for gate in decided
        for metric, least in gate.least.items()
    ]
    note = "Where dense, trained on both tasks, does not reach these means, nothing is decided."
    return ["## Gate", note, markdown(pd.DataFrame(lines))]


def hypotheses(decisions: Sequence[Decision]) -> list[str]:
    """The verdicts, then the claims that they follow from."""
    if not decisions:
        return []
    verdicts = [
        {"hypothesis": d.hypothesis.name, "statement": d.hypothesis.statement, "size": d.size}
        | {
            "p (Holm)": p_value(d.p),
            "p against (Holm)": p_value(d.p_against),
            "verdict": f"{d.verdict} ({d.note})" if d.note else d.verdict,
        }
        for d in decisions
    ]
    claims = [
        {"hypothesis": d.hypothesis.name, "size": d.size, "metric": c.claim.metric, "contrast": c.claim.contrast}
        | {"budget": c.claim.budget, "claim": str(c.claim), "seeds": len(c.values)}
        | {"estimate": signed(c.estimate), "p": p_value(c.p), "p, signs": p_value(c.sign_flip)}
        | {"p against": p_value(c.p_against)}
        for d in decisions
        for c in d.claims
    ]
    note = (
        "Claims are about scores, of which more is better: log points (100 ln, with the sign turned for losses), or "
        "points for chance-corrected figures. A hypothesis is supported if all of its claims are, and refuted if one "
        "is shown to be wrong, each at 5 % after Holm's adjustment over the hypotheses of a size. While a claim lacks "
        "seeds of the study, it is incomplete."
    )
    return ["## Hypotheses", markdown(pd.DataFrame(verdicts)), note, markdown(pd.DataFrame(claims))]


def beside_the_paper(results: Results) -> list[str]:
    """The paper's tables with ours beside, for methods that have its names."""
    parts = [f"{title}:\n\n{markdown(table)}" for title, table in beside_paper.tables(results)]
    note = (
        "In brackets what a method changes against dense, positive where it is better. Figures of another size, other "
        "data or other benchmarks compare in this and in the parts of the synergy loss alone."
    )
    return ["## Beside arXiv 2606.01503", *parts, note] if parts else []
