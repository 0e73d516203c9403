"""Line charts as SVG: matplotlib's drawing, the page's colours, and the values at each x to show on hovering.

matplotlib's SVG can neither follow the page into dark mode nor answer the mouse: its colours here are placeholders,
replaced by the variables of ``svg.css``, and ``chart.svg.j2`` puts an invisible band with a title over each x.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 40
MIN_POINTS, MAX_POINTS = 3, 240

_COLOURS = ("understanding", "generation", "text", "accent", "ink", "muted", "rule", "paper")  # variables of svg.css
_PLACEHOLDERS = {name: f"#0000{i:02}" for i, name in enumerate(_COLOURS, start=1)}
_STYLE_FILE = Path(__file__).parent / "templates" / "chart.mplstyle"
_STYLE_COLOURS = {
    "axes.labelcolor": _PLACEHOLDERS["ink"],
    "grid.color": _PLACEHOLDERS["rule"],
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor"), _PLACEHOLDERS["muted"]),
}


@dataclass
class Series:
    """One curve.

    Attributes:
        label: for the legend and the hover text; a series without a label is in neither.
        colour: name of a colour in ``svg.css``.
        points: finite (x, y) in order of x, float [n, 2].
        style: ``line``, ``faint``, ``dots`` (a line with a mark at each point) or ``area`` (filled down to zero).
    """

    label: str
    colour: str
    points: np.ndarray
    style: str = "line"


@dataclass
class Chart:
    """A chart for ``chart.svg.j2``.

    Attributes:
        name: of the file in the Markdown version.
        description: for screen readers.
        plot: the SVG elements inside of ``<svg>``.
        bands: (left end, width, x, text) of each x with a value, in pixels.
    """

    name: str
    description: str
    plot: str
    bands: list[tuple[float, float, float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(
    name: str, y_label: str, series: Sequence[Series], from_zero: bool = False, description: str = ""
) -> Chart | None:
    """A chart over iterations; the y axis starts at 0 (``from_zero``) or fits the values.

    Series of fewer than ``MIN_POINTS`` points show no course and are left out; None without any other.
    """
    series = [replace(s, points=thin(s.points)) for s in series if len(s.points) >= MIN_POINTS]
    if not series:
        return None
    with matplotlib.rc_context(_STYLE_COLOURS, _STYLE_FILE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        size = ((WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, *size))
        for s in series:
            _add_curve(axes, s)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
        axes.grid(axis="y", clip_on=False)
        axes.margins(x=0)
        y_ticks = axes.yaxis.get_major_locator().tick_values(*_y_range(series, from_zero))
        axes.set_ylim(y_ticks[0], y_ticks[-1])
        axes.set_xlabel("iteration", loc="right")
        figure.text(8 / WIDTH, 1 - 14 / HEIGHT, y_label, color=_PLACEHOLDERS["ink"])
        if any(s.label for s in series):
            figure.legend(loc="upper right", bbox_to_anchor=(1 - RIGHT / WIDTH, 1 - 4 / HEIGHT), ncols=len(series))
        bands = _bands(axes, [s for s in series if s.label])
        return Chart(name, description or y_label, _svg(figure), bands)


def thin(points: np.ndarray) -> np.ndarray:
    """At most ``MAX_POINTS`` points: the means over equal runs of points, with the last x as it is."""
    means = [run.mean(axis=0) for run in np.array_split(points, min(len(points), MAX_POINTS))]
    means[-1][0] = points[-1][0]
    return np.stack(means)


def smooth(points: np.ndarray, share: float = 0.06) -> np.ndarray:
    """Centred moving average over ``share`` of the points, narrower towards the ends."""
    if not len(points):
        return points
    i, last = np.arange(len(points)), len(points) - 1
    reach = np.minimum(max(1, round(len(points) * share / 2)), np.minimum(i, last - i))
    sums = np.concatenate([[0.0], points[:, 1].cumsum()])
    return np.column_stack([points[:, 0], (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)])


def number(value: float) -> str:
    """A number short enough for an axis."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= (1e4 if unit == "k" else size):
            return f"{value / size:.3g}{unit}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.4g}"


def _add_curve(axes, s: Series) -> None:
    x, y = s.points.T
    label, colour = s.label or None, _PLACEHOLDERS[s.colour]
    if s.style == "area":
        axes.fill_between(x, y, color=colour, alpha=0.38, linewidth=0, label=label)
    elif s.style == "faint":
        axes.plot(x, y, color=colour, alpha=0.35, linewidth=1, label=label)
    elif s.style == "dots":
        mark = {"marker": "o", "markersize": 6.4, "markeredgewidth": 1.6, "markerfacecolor": _PLACEHOLDERS["paper"]}
        axes.plot(x, y, color=colour, linewidth=1.3, label=label, clip_on=False, **mark)
    else:
        axes.plot(x, y, color=colour, linewidth=2, label=label)


def _y_range(series: list[Series], from_zero: bool) -> tuple[float, float]:
    """The range of all values except the largest 1 % of faint lines, whose spikes would flatten the rest."""
    values = [s.points[:, 1] for s in series if s.style != "faint"]
    values += [np.sort(s.points[:, 1])[: -(-len(s.points) * 99 // 100)] for s in series if s.style == "faint"]
    values = np.concatenate(values)
    low, high = values.min(), values.max()
    if from_zero:
        return min(low, 0.0), high if high > 0 else 1.0
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin if low < 0 or low > margin else 0.0, high + margin


def _bands(axes, series: list[Series]) -> list[tuple[float, float, float, str]]:
    """Bands for ``Chart``: each x owns the width up to half-way to its neighbours."""
    values = [dict(s.points.tolist()) for s in series]
    xs = sorted(set().union(*values))
    at = axes.transData.transform([(x, 0) for x in xs])[:, 0] / axes.figure.dpi * 72
    edges = np.concatenate([at[:1], (at[:-1] + at[1:]) / 2, at[-1:]])
    bands = []
    for x, middle, left, right in zip(xs, at, edges, edges[1:]):
        lines = [f"{s.label}: {known[x]:.4g}" for s, known in zip(series, values) if x in known]
        bands.append((left, max(right - left, 1), middle, "\n".join([f"iteration {number(round(x))}", *lines])))
    return bands


def _svg(figure: Figure) -> str:
    """The elements of the figure, with the page's colours and without ids that would repeat in the next chart."""
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    elements = stream.getvalue().partition("<svg ")[2].partition(">")[2].rpartition("</svg>")[0]
    elements = re.sub(r' id="[a-zA-Z0-9]+_\d+"', "", elements)
    return re.sub(r"#0000(\d\d)", lambda match: f"var(--{_COLOURS[int(match[1]) - 1]})", elements)
