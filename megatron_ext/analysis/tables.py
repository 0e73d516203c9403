"""Tables of synergy as DataFrames of text, and their form in Markdown, LaTeX and CSV."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from megatron_ext.analysis.bootstrap import interval
from megatron_ext.analysis.synergy import REFERENCE, TASKS, Comparison, Effect

GAINS, LOSSES = "Gain of unified over single-task training", "Synergy loss against dense"
"""Titles of :func:`gains` and :func:`losses`."""
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


def gains(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """A row per method, a column per metric and per task's average: gains in percent."""
    return _table(comparisons, lambda effect: effect.gain, "%")


def losses(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Synergy losses in percentage points, without the methods that have none."""
    compared = [c for c in comparisons if c.method != REFERENCE and any(e.loss is not None for e in c.effects)]
    return _table(compared, lambda effect: effect.loss, "pp")


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """A line per method, setting and metric, with unrounded fractions; a missing number is empty."""
    columns = ["method", *SETTINGS, "flops_ratio", "task", "metric", "unified", "single"]
    columns += [f"{quantity}{bound}" for quantity in ("gain", "loss") for bound in ("", "_low", "_high")]
    records = []
    for c in as_json(comparisons):
        for effect in (*c["effects"], *c["averages"]):
            bounds = {
                f"{quantity}_{side}": bound
                for quantity in ("gain", "loss")
                for side, bound in zip(("low", "high"), effect[f"{quantity}_interval"] or ())
            }
            records.append(c | effect | bounds)
    return pd.DataFrame(records, columns=columns).to_csv(index=False, lineterminator="\n")


def as_json(comparisons: Sequence[Comparison]) -> list[dict]:
    """The comparisons as plain data: fractions, with 95 % intervals where there are replicates."""
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


def percent(values: np.ndarray | None, unit: str = "%") -> str:
    """``+5.9 %``, with its interval if there is one; ``-`` for a missing figure."""
    if values is None or not np.isfinite(values[0]):
        return "-"
    bounds = interval(values)
    spread = f" [{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]" if bounds else ""
    return f"{100 * values[0]:+.1f} {unit}{spread}"


def _table(
    comparisons: Sequence[Comparison], quantity: Callable[[Effect], np.ndarray | None], unit: str
) -> pd.DataFrame:
    settings = [key for key in SETTINGS if len({getattr(c, key) for c in comparisons}) > 1]
    table = pd.DataFrame(
        [
            {"method": c.method}
            | {key.replace("_", " "): getattr(c, key) or "-" for key in settings}
            | {"FLOPs": "-" if c.flops_ratio is None else f"{c.flops_ratio:.2f}"}
            | {e.metric: percent(quantity(e), unit) for e in c.effects}
            | {f"mean {e.task}": percent(quantity(e), unit) for e in c.averages}
            for c in comparisons
        ]
    )
    means_last = sorted(table, key=lambda column: MEANS.index(column) if column in MEANS else -1)
    return table[means_last].fillna("-")


def _plain(effect: Effect) -> dict:
    numbers = {name: getattr(effect, name) for name in ("unified", "single", "gain", "loss")}
    return {
        "metric": effect.metric,
        "task": effect.task,
        "seeds": [seed for seed in effect.seeds if seed is not None],
        **{k: None if v is None or not np.isfinite(v[0]) else float(v[0]) for k, v in numbers.items()},
        "gain_interval": interval(effect.gain),
        "loss_interval": interval(effect.loss),
    }


def _markdown_cell(cell: object) -> str:
    return str(cell).replace("|", "\\|")
