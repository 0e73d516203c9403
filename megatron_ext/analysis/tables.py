"""A table of text as Markdown, LaTeX or CSV, and the tables of synergy."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.analysis.bootstrap import interval
from megatron_ext.analysis.synergy import REFERENCE, TASKS, Comparison, Effect

_LATEX = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "…": r"\dots{}", "−": "$-$"}


@dataclass
class Table:
    """Cells as text; the first column is aligned left, the others right."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [[cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*lines)]
        rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        padded = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))

    def latex(self) -> str:
        """A ``tabular`` with booktabs rules inside a ``table``."""
        body = [" & ".join(map(_latex, row)) + r" \\" for row in self.rows]
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(self.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}",
            r"\toprule",
            " & ".join(map(_latex, self.head)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines)


def gains(comparisons: Sequence[Comparison], title: str = "Gain of unified over single-task training") -> Table:
    """A row per method, a column per metric and per task's average: gains in percent."""
    return _table(comparisons, title, lambda effect: effect.gain, "%")


def losses(comparisons: Sequence[Comparison], title: str = "Synergy loss against dense") -> Table:
    """The same with synergy losses in percentage points, without the rows that have none."""
    return _table(
        [c for c in comparisons if c.method != REFERENCE and any(e.loss is not None for e in c.effects)],
        title,
        lambda effect: effect.loss,
        "pp",
    )


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """A line per method, setting and metric, with unrounded fractions; a missing number is empty."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    records = as_json(comparisons)
    names = ["unified", "single", "gain", "gain_low", "gain_high", "loss", "loss_low", "loss_high"]
    lines.writerow(["method", "size", "budget", "evaluated_as", "flops_ratio", "task", "metric", *names])
    for c in records:
        for e in (*c["effects"], *c["averages"]):
            bounds = {
                f"{k}_{side}": (e[f"{k}_interval"] or (None, None))[i]
                for k in ("gain", "loss")
                for i, side in enumerate(("low", "high"))
            }
            setting = [c[k] for k in ("method", "size", "budget", "evaluated_as", "flops_ratio")]
            lines.writerow([*setting, e["task"], e["metric"], *((e | bounds)[name] for name in names)])
    return text.getvalue()


def as_json(comparisons: Sequence[Comparison]) -> list[dict]:
    """Everything as plain data: fractions, 95 % intervals where there are replicates."""
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
    """``+5.9 %``, with its interval where it has one; ``-`` where there is no figure."""
    if values is None or not np.isfinite(values[0]):
        return "-"
    bounds = interval(values)
    spread = f" [{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]" if bounds else ""
    return f"{100 * values[0]:+.1f} {unit}{spread}"


def _table(comparisons: Sequence[Comparison], title: str, which, unit: str) -> Table:
    metrics = list(dict.fromkeys(e.metric for c in comparisons for e in c.effects))
    tasks = [task for task in TASKS if any(c.average(task) for c in comparisons)]
    settings = [key for key in ("size", "budget", "evaluated_as") if len({getattr(c, key) for c in comparisons}) > 1]

    def cell(effect: Effect | None) -> str:
        return percent(which(effect), unit) if effect else "-"

    rows = [
        [
            c.method,
            *(str(getattr(c, key) or "-") for key in settings),
            "-" if c.flops_ratio is None else f"{c.flops_ratio:.2f}",
            *(cell(c.effect(metric)) for metric in metrics),
            *(cell(c.average(task)) for task in tasks),
        ]
        for c in comparisons
    ]
    names = [key.replace("_", " ") for key in settings]
    return Table(title, ["method", *names, "FLOPs", *metrics, *(f"mean {task}" for task in tasks)], rows)


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


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
