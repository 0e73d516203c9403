"""Tables of synergy as DataFrames of text, and their form in Markdown, LaTeX and CSV."""

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd

from megatron_ext.analysis.outcomes import Outcome
from megatron_ext.analysis.statistics import Estimate
from megatron_ext.analysis.synergy import QUANTITIES, TASKS, Comparison, Effect

PARTS = "Synergy, and synergy loss as unified cost + partner advantage (log points, 100 ln)"
TESTS = "Tests of the primary outcomes (log points, 100 ln)"
"""Titles of :func:`parts` and :func:`tests`."""
SETTINGS = ("size", "budget", "evaluated_as")
MEANS = [f"mean {task}" for task in TASKS]


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown; the first column is aligned left, the others right."""
    cells = table.rename(columns=_markdown_cell).map(_markdown_cell)
    sides = ("left", *["right"] * (len(cells.columns) - 1))
    return cells.to_markdown(index=False, disable_numparse=True, colalign=sides)


def latex(table: pd.DataFrame, caption: str) -> str:
    """A table as LaTeX with booktabs rules."""
    sides = "l" + "r" * (len(table.columns) - 1)
    return table.to_latex(index=False, escape=True, column_format=sides, caption=caption).rstrip()


def parts(comparisons: Sequence[Comparison], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """A row per metric and method: the paper's gain, synergy, and the two parts of the synergy loss beside it, with
    95 % intervals; empty if there is nothing to compare.

    Args:
        metrics: metrics, or means as ``mean understanding``; None for all.
    """
    if metrics is None:
        metrics = [*dict.fromkeys(e.metric for c in comparisons for e in c.effects), *MEANS]
    settings = [key for key in SETTINGS if len({getattr(c, key) for c in comparisons}) > 1]
    return pd.DataFrame(
        [
            {"metric": metric_label(metric, effect), "method": c.method}
            | {key.replace("_", " "): getattr(c, key) or "-" for key in settings}
            | {"FLOPs": "-" if c.flops_ratio is None else f"{c.flops_ratio:.2f}"}
            | {"gain": "-" if effect.gain is None else f"{100 * effect.gain:+.1f} %"}
            | {name: signed(effect.estimate(quantity)) for quantity, name in QUANTITIES.items()}
            for metric in metrics
            for c in comparisons
            if (effect := c.of(metric))
        ]
    )


def tests(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """A row per quantity, metric and method; empty without primary outcomes or with one seed."""
    settings = [key for key in SETTINGS if len({getattr(o, key) for o in outcomes}) > 1]
    return pd.DataFrame(
        [
            {
                "quantity": QUANTITIES[o.quantity],
                "metric": o.metric,
                "method": o.method,
                **{key.replace("_", " "): getattr(o, key) or "-" for key in settings},
                "seeds": o.estimate.n,
                "estimate": signed(o.estimate),
                "p, t": p_value(o.estimate.p),
                "p, signs": p_value(o.sign_flip),
                "p, t (Holm)": p_value(o.p),
                "p, equivalence (Holm)": p_value(o.p_equivalent),
                "verdict": o.verdict,
            }
            for o in outcomes
            if o.estimate.n > 1
        ]
    )


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """A line per method, setting and metric, unrounded; a missing number is empty."""
    columns = ["method", *SETTINGS, "flops_ratio", "task", "metric", "scale", "unified", "single", "gain"]
    columns += [f"{quantity}{part}" for quantity in QUANTITIES for part in ("", "_low", "_high", "_p", "_n")]
    records = []
    for c in as_json(comparisons):
        for effect in (*c["effects"], *c["averages"]):
            record = {key: c[key] for key in ("method", *SETTINGS, "flops_ratio")} | effect
            for quantity in QUANTITIES:
                estimate = record.pop(quantity) or {}
                record |= {f"{quantity}_{part}": estimate.get(part) for part in ("low", "high", "p", "n")}
                record[quantity] = estimate.get("mean")
            records.append(record)
    return pd.DataFrame(records, columns=columns).to_csv(index=False, lineterminator="\n")


def as_json(comparisons: Sequence[Comparison]) -> list[dict]:
    """The comparisons as plain data: estimates in log points or points, with 95 % intervals; gains as fractions."""
    return [
        {
            "method": c.method,
            "size": c.size,
            "budget": c.budget,
            "evaluated_as": c.evaluated_as,
            "flops_ratio": c.flops_ratio,
            "parameters": c.parameters,
            "effects": list(map(_plain, c.effects)),
            "averages": list(map(_plain, c.averages)),
            "missing": c.missing,
        }
        for c in comparisons
    ]


def signed(estimate: Estimate | None) -> str:
    """``+5.9 [-0.3, +12.1]``; without brackets for one seed, ``-`` for a missing estimate."""
    if estimate is None:
        return "-"
    interval = "" if estimate.low is None else f" [{estimate.low:+.1f}, {estimate.high:+.1f}]"
    return f"{estimate.mean:+.1f}{interval}"


def p_value(p: float | None) -> str:
    """Two significant digits, or ``< 0.001``."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def metric_label(metric: str, effect: Effect) -> str:
    """The metric's name; those compared in points say so."""
    return f"{metric} (points)" if effect.scale == "points" else metric


def _plain(effect: Effect) -> dict:
    estimates = {quantity: effect.estimate(quantity) for quantity in QUANTITIES}
    return {
        "metric": effect.metric,
        "task": effect.task,
        "scale": effect.scale,
        "seeds": [seed for seed in effect.synergy or effect.unified_cost if seed is not None],
        "unified": effect.unified,
        "single": effect.single,
        "gain": effect.gain,
        **{quantity: estimate and asdict(estimate) for quantity, estimate in estimates.items()},
    }


def _markdown_cell(cell: object) -> str:
    return str(cell).replace("|", "\\|")
