"""Causal depth curves as tables and as a figure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from megatron_ext.analysis.depth import INTERVENTIONS, LEAST_SEEDS, Curve, by_model, curves
from megatron_ext.analysis.results import Results
from megatron_ext.analysis.tables import markdown, p_value, signed

NOTE = (
    "Trained models, evaluated with other roles: {what}. Brackets are 95 % t-intervals over {seeds} seeds, of the "
    "change against the same models with the roles of training, in log points (100 ln) or, for metrics that may be 0 "
    "or less, in points; above 0 is better. The slope is that of the score over K."
)


def sections(results: Results, figures: Path) -> list[str]:
    """The curves as parts of a Markdown report beside the folder ``figures``; empty without curves."""
    parts = []
    for model, of_model in by_model(curves(results)).items():
        file = plot(of_model, figures)
        parts += [f"### {title(model)}", *tables(of_model), f"![{title(model)}]({figures.name}/{file.name})"]
    return ["## Causal depth curves", *parts] if parts else []


def title(model: tuple[str | None, ...]) -> str:
    """The name of a model of :func:`~megatron_ext.analysis.depth.by_model`."""
    return "Depth, " + ", ".join(filter(None, model))


def tables(of_model: Sequence[Curve]) -> list[str]:
    """The curves of one model as Markdown: a table for each intervention, and what it says."""
    parts = []
    for intervention, (_, what) in INTERVENTIONS.items():
        selected = [curve for curve in of_model if curve.intervention == intervention]
        if selected:
            seeds = " to ".join(map(str, sorted({min(c.n for c in selected), max(c.n for c in selected)})))
            parts += [NOTE.format(what=what, seeds=seeds), markdown(_table(selected))]
    return parts


def _table(selected: Sequence[Curve]) -> pd.DataFrame:
    """A row for each K, one for the roles of training, and one for the slopes."""
    rows = []
    for layer in selected[0].layers:
        row = {"K": str(layer)}
        for curve in selected:
            row[curve.metric] = _mean(curve.figures[layer])
            row[f"{curve.metric}: change"] = signed(curve.changes[layer])
            if curve.untrained:
                row[f"{curve.metric}: untrained"] = _mean([curve.untrained[layer]]) if layer in curve.untrained else "-"
        rows.append(row)
    trained, slope = {"K": "roles of training"}, {"K": "slope per layer"}
    for curve in selected:
        trained[curve.metric] = _mean(curve.trained)
        if curve.trend:
            p = f"p {p_value(curve.trend.p)}" if curve.n >= LEAST_SEEDS else f"no test below {LEAST_SEEDS} seeds"
            slope[f"{curve.metric}: change"] = f"{signed(curve.trend)}, {p}"
    return pd.DataFrame([*rows, trained, slope]).fillna("")


def _mean(figures: Sequence[float]) -> str:
    return f"{np.mean(figures):.4g}"


def plot(of_model: Sequence[Curve], folder: Path) -> Path:
    """Plot a model's figures over K: a panel per metric, a thin line per seed, their mean, the mean with the roles of
    training (dotted), and the untrained model (dashed). Returns the file."""
    # Imported late: tables should not wait for matplotlib.
    from matplotlib.ticker import FormatStrFormatter

    from megatron_ext.analysis import plots

    figure, axes = plots.subplots(1, len(of_model), figsize=(3.6 * len(of_model) + 1, 3.6), squeeze=False)
    for curve, axis in zip(of_model, axes[0]):
        figures = np.array([curve.figures[layer] for layer in curve.layers])  # [layers, seeds]
        axis.plot(curve.layers, figures, color="#8db4e2", linewidth=0.8)
        axis.plot(curve.layers, figures.mean(axis=1), color="#1f3f73", marker="o", markersize=4, label="mean of seeds")
        axis.axhline(np.mean(curve.trained), color="black", linewidth=0.8, linestyle=":", label="roles of training")
        if curve.untrained:
            style = {"color": "#e08a3c", "linewidth": 1, "linestyle": "--"}
            axis.plot(list(curve.untrained), list(curve.untrained.values()), label="untrained", **style)
        axis.set(xlabel=f"K ({curve.intervention}_K)", title=curve.metric, xticks=curve.layers)
        if curve.scale == "log":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
        axis.title.set_fontsize(10)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    first = of_model[0]
    file = folder / ("-".join(filter(None, ["depth", first.size, first.budget, first.method])) + ".svg")
    plots.save(figure, file)
    return file
