"""Figures: how all of them are saved, bars of gains, losses over model size and FLOPs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from megatron_ext.analysis.bootstrap import interval
from megatron_ext.analysis.fit import Fit
from megatron_ext.analysis.synergy import REFERENCE, Comparison
from megatron_ext.errors import UserError

_DATES = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
"""Format -> metadata without a timestamp."""


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


def bars(comparisons: Sequence[Comparison], file: Path, title: str = "") -> None:
    """Plot gains of unified over single-task training in percent: a group of bars per metric, a bar per method."""
    metrics = list(dict.fromkeys(e.metric for c in comparisons for e in c.effects))
    figure, axis = subplots(figsize=(max(6, 1.5 * len(metrics) + 2), 4))
    width = 0.8 / max(1, len(comparisons))
    for number, comparison in enumerate(comparisons):
        present = [(place, e) for place, m in enumerate(metrics) if (e := comparison.effect(m))]
        places = [place + (number - (len(comparisons) - 1) / 2) * width for place, _ in present]
        heights = [100 * e.gain[0] for _, e in present]
        axis.bar(places, heights, width * 0.92, label=comparison.method, yerr=_errors([e.gain for _, e in present]))
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set_xticks(range(len(metrics)), metrics)
    axis.set(ylabel="gain of unified over single-task (%)", title=title)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8)
    save(figure, file)


def scaling(comparisons: Sequence[Comparison], metric: str, fits: Mapping[str, Fit], file: Path) -> None:
    """Plot synergy loss over model size, with the fitted lines, and over FLOPs.

    Args:
        metric: a metric, or ``mean understanding`` or ``mean generation``.
        fits: method -> the line through its losses.
    """
    figure, (over_size, over_flops) = subplots(1, 2, figsize=(11, 4), sharey=True)
    methods = dict.fromkeys(c.method for c in comparisons if c.method != REFERENCE)
    for number, method in enumerate(methods):
        selected = [c for c in comparisons if c.method == method and c.loss_of(metric) is not None]
        if not selected:
            continue
        losses = [c.loss_of(metric) for c in selected]
        style = {"fmt": "o", "color": f"C{number % 10}", "capsize": 3, "markersize": 4, "label": method}
        heights, errors = [100 * loss[0] for loss in losses], _errors(losses)
        # Shifted sideways, or the intervals of methods of one size would hide each other.
        shift = 1 + 0.02 * (number - (len(methods) - 1) / 2)
        over_size.errorbar([c.parameters * shift for c in selected], heights, errors, **style)
        over_flops.errorbar([c.flops_ratio for c in selected], heights, errors, **style)
        if line := fits.get(method):
            sizes = np.array(line.parameters)
            over_size.plot(sizes, 100 * line.at(sizes), color=style["color"], linewidth=1.2)
    over_size.set(xscale="log", xlabel="parameters of the dense model", ylabel="synergy loss (points)", title=metric)
    over_flops.set(xlabel="training FLOPs / dense", title=metric)
    for axis in (over_size, over_flops):
        axis.axhline(0, color="0.3", linewidth=0.8)
        axis.grid(alpha=0.3)
    if methods:
        over_size.legend(fontsize=7)
    save(figure, file)


def _errors(values: Sequence[np.ndarray]) -> np.ndarray | None:
    """Distances to the ends of the intervals in percent, [2, values]; None without any interval."""
    bounds = [interval(v) for v in values]
    if not any(bounds):
        return None
    ends = [(max(0.0, v[0] - b[0]), max(0.0, b[1] - v[0])) if b else (0.0, 0.0) for v, b in zip(values, bounds)]
    return 100 * np.array(ends).T
