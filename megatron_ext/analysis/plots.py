"""Figures: how all of them are saved; the parts of synergy losses by method, over model size and over FLOPs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from megatron_ext.analysis.fit import Fit
from megatron_ext.analysis.statistics import Estimate
from megatron_ext.analysis.synergy import REFERENCE, Comparison
from megatron_ext.errors import UserError

_DATES = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
"""Format -> metadata without a timestamp."""
_UNITS = {"log": "log points", "points": "points"}
_COLUMNS = {"unified_cost": "unified cost", "partner_advantage": "partner advantage", "loss": "synergy loss (sum)"}
"""The parts of a synergy loss, side by side in every figure."""


def subplots(*shape: int, **settings):
    """``pyplot.subplots`` with the constrained layout."""
    return pyplot.subplots(*shape, layout="constrained", **settings)


def save(figure, file: Path) -> None:
    """Save a figure and close it. Equal figures give equal files: without a timestamp, SVG with text as text.

    Raises:
        UserError: the file's suffix is not .svg, .pdf or .png.
    """
    suffix = file.suffix.lstrip(".") or "png"
    if suffix not in _DATES:
        raise UserError(f"{file}: unknown figure format; use .svg, .pdf or .png")
    file.parent.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "unified-megatron"}):
        figure.savefig(file, dpi=110, format=suffix, metadata=_DATES[suffix])
    pyplot.close(figure)


def bars(comparisons: Sequence[Comparison], file: Path, title: str = "", metrics: Sequence[str] | None = None) -> None:
    """Plot unified cost, partner advantage and their sum, the synergy loss, as three panels of horizontal bars.

    A group of bars per metric, a bar per method. Metrics in points have axes of their own, below those in log points.
    An interval that is much longer than the bars leaves the axes.

    Args:
        metrics: None for all that have a unified cost or a partner advantage.
    """
    reduced = [c for c in comparisons if c.method != REFERENCE]
    shown = {scale: names for scale in _UNITS if (names := _metrics(reduced, scale, metrics))}
    heights = [0.17 * len(names) * (len(reduced) + 1) + 0.9 for names in shown.values()] or [2]
    shape = {"figsize": (12, sum(heights)), "height_ratios": heights, "squeeze": False}
    figure, axes = subplots(len(heights), 3, **shape, sharex="row", sharey="row")
    for (scale, names), row in zip(shown.items(), axes):
        for axis, (quantity, name) in zip(row, _COLUMNS.items()):
            _bars(axis, reduced, names, quantity)
            axis.set(xlabel=f"{name} ({_UNITS[scale]})")
        known = [e for c in reduced for name in names for q in _COLUMNS if (e := c.estimate(name, q))]
        longest = max(abs(estimate.mean) for estimate in known) or 1
        end = max(abs(e.mean) if e.low is None else max(-e.low, e.high) for e in known)
        limit = 1.1 * max(longest, min(end, 4 * longest))
        row[0].set(xlim=(-limit, limit))
        row[0].set_yticks(range(len(names)), names)
        row[0].invert_yaxis()
    if shown:
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title)
    save(figure, file)


def _metrics(comparisons: Sequence[Comparison], scale: str, metrics: Sequence[str] | None) -> list[str]:
    """Metrics of a scale with a cost or an advantage."""
    effects = [
        e for c in comparisons for e in c.effects if e.scale == scale and (metrics is None or e.metric in metrics)
    ]
    return list(dict.fromkeys(e.metric for e in effects if e.unified_cost or e.partner_advantage))


def _bars(axis, comparisons: Sequence[Comparison], metrics: Sequence[str], quantity: str) -> None:
    height = 0.8 / max(1, len(comparisons))
    for number, comparison in enumerate(comparisons):
        known = [(place, e) for place, m in enumerate(metrics) if (e := comparison.estimate(m, quantity))]
        places = [place + (number - (len(comparisons) - 1) / 2) * height for place, _ in known]
        estimates = [estimate for _, estimate in known]
        widths = [estimate.mean for estimate in estimates]
        axis.barh(places, widths, height * 0.92, label=comparison.method, xerr=_errors(estimates))
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def scaling(comparisons: Sequence[Comparison], metric: str, fits: Mapping[tuple[str, str], Fit], file: Path) -> None:
    """Plot unified cost, partner advantage and synergy loss over model size, with the fitted lines, and over FLOPs.

    Args:
        metric: a metric, or ``mean understanding`` or ``mean generation``.
        fits: (method, quantity) -> the line through its values.
    """
    figure, axes = subplots(2, 3, figsize=(12, 7), sharey=True, sharex="row")
    methods = dict.fromkeys(c.method for c in comparisons if c.method != REFERENCE)
    for (over_size, over_flops), (quantity, name) in zip(axes.T, _COLUMNS.items()):
        for number, method in enumerate(methods):
            known = [(c, e) for c in comparisons if c.method == method and (e := c.estimate(metric, quantity))]
            if not known:
                continue
            estimates = [estimate for _, estimate in known]
            style = {"fmt": "o", "color": f"C{number % 10}", "capsize": 3, "markersize": 4, "label": method}
            heights, errors = [estimate.mean for estimate in estimates], _errors(estimates)
            # Shifted sideways, or the intervals of methods of one size would hide each other.
            shift = 1 + 0.02 * (number - (len(methods) - 1) / 2)
            over_size.errorbar([c.parameters * shift for c, _ in known], heights, errors, **style)
            over_flops.errorbar([c.flops_ratio for c, _ in known], heights, errors, **style)
            if line := fits.get((method, quantity)):
                sizes = np.array(line.parameters)
                over_size.plot(sizes, line.at(sizes), color=style["color"], linewidth=1.2)
        over_size.set(xscale="log", xlabel="parameters of the dense model", title=name)
        over_flops.set(xlabel="training FLOPs / dense")
        for axis in (over_size, over_flops):
            axis.axhline(0, color="0.3", linewidth=0.8)
            axis.grid(alpha=0.3)
    effects = [effect for c in comparisons if (effect := c.of(metric))]
    for axis in axes[:, 0]:
        axis.set(ylabel=f"{metric} ({_UNITS[effects[0].scale] if effects else ''})")
    if methods:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, file)


def _errors(estimates: Sequence[Estimate]) -> list[list[float]] | None:
    """Distances to the ends of the intervals, [2, estimates]; None without any interval."""
    if all(estimate.low is None for estimate in estimates):
        return None
    half_widths = [0.0 if e.low is None else e.mean - e.low for e in estimates]
    return [half_widths, half_widths]
