"""Line charts as SVG that is crisp at any size, follows the page's light or dark colours, and answers the mouse."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 40
MOST_POINTS = 240


@dataclass
class Series:
    """One curve.

    Attributes:
        label: for the legend and the hover text; a series without one is left out of the legend.
        colour: CSS class that sets the colour (``understanding``, ``generation``, ``text``, ``ink``, ``muted``).
        points: (x, y) in order of x; a y of None is left out.
        style: ``line``, ``faint``, ``dots`` (a line with a mark at each point) or ``area`` (filled down to zero).
    """

    label: str
    colour: str
    points: list[tuple[float, float | None]]
    style: str = "line"


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, from_zero: bool = False, description: str = ""
) -> str:
    """An SVG line chart; hovering shows every series' value at that x.

    Args:
        from_zero: the y axis starts at 0; otherwise it fits the values.
        description: for readers that do not see.
    """
    drawn = [Series(s.label, s.colour, thin(_known(s.points)), s.style) for s in series]
    drawn = [s for s in drawn if s.points]
    xs = [x for s in drawn for x, _ in s.points] or [0.0]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = _y_range(drawn, from_zero)
    x_ticks = [t for t in ticks(x_low, x_high, 6) if x_low <= t <= x_high]
    y_ticks = ticks(y_low, y_high, 4)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def px(x: float) -> float:
        return LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        clipped = min(max(y, y_low), y_high)
        return HEIGHT - BOTTOM - (clipped - y_low) / ((y_high - y_low) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg" '
        f'aria-label="{escape(description or y_label)}">'
    ]
    for t in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{py(t) + 4:.1f}" text-anchor="end">{number(t)}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for t in x_ticks:
        parts.append(f'<line class="axis" x1="{px(t):.1f}" x2="{px(t):.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{px(t):.1f}" y="{bottom + 17}" text-anchor="middle">{number(t)}</text>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="{LEFT - 44}" y="14">{escape(y_label)}</text>')
    for s in drawn:
        parts += _curve(s, [(px(x), py(y)) for x, y in s.points], py(max(y_low, 0.0)))
    parts += _legend([s for s in drawn if s.label])
    parts += _hover([s for s in drawn if s.label], x_label, px)
    return "".join(parts) + "</svg>"


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``MOST_POINTS`` points: means over equal runs of them, the last point kept as it is."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS - 1))
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
    return [*means[:-1], (points[-1][0], means[-1][1])]


def smooth(points: list[tuple[float, float | None]], share: float = 0.06) -> list[tuple[float, float]]:
    """Centred moving average over ``share`` of the points, narrower towards the ends."""
    known = _known(points)
    half = max(1, round(len(known) * share / 2))
    means = []
    for i, (x, _) in enumerate(known):
        reach = min(half, i, len(known) - 1 - i)
        window = known[i - reach : i + reach + 1]
        means.append((x, sum(y for _, y in window) / len(window)))
    return means


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers that cover ``low`` .. ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number short enough for an axis."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= (1e4 if unit == "k" else size):
            return f"{value / size:.3g}{unit}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.4g}"


def _known(points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _y_range(drawn: list[Series], from_zero: bool) -> tuple[float, float]:
    """All of what is drawn, but for the worst 1 % of faint lines, whose spikes would flatten the rest."""
    values = []
    for s in drawn:
        ys = sorted(y for _, y in s.points)
        values += ys[: max(1, math.ceil(len(ys) * 0.99))] if s.style == "faint" else ys
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        return min(low, 0.0), high if high > 0 else 1.0
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin if low < 0 or low > margin else 0.0, high + margin


def _curve(s: Series, at: list[tuple[float, float]], base: float) -> list[str]:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    if s.style == "area":
        return [f'<path class="area {s.colour}" d="{path}L{at[-1][0]:.1f} {base:.1f}L{at[0][0]:.1f} {base:.1f}Z"/>']
    parts = [f'<path class="{s.style} {s.colour}" d="{path}"/>']
    if s.style == "dots" or len(at) == 1:
        parts += [f'<circle class="dot {s.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in at]
    return parts


def _legend(drawn: list[Series]) -> list[str]:
    parts, x = [], WIDTH - RIGHT
    for s in reversed(drawn):
        x -= 6.2 * len(s.label)
        mark = {
            "dots": f'<circle class="dot {s.colour}" cx="{x - 12:.0f}" cy="10" r="3.2"/>',
            "area": f'<rect class="area {s.colour}" x="{x - 18:.0f}" y="5" width="12" height="10"/>',
        }.get(s.style, f'<line class="{s.style} {s.colour}" x1="{x - 19:.0f}" x2="{x - 5:.0f}" y1="10" y2="10"/>')
        parts.append(f'{mark}<text class="tick" x="{x:.0f}" y="14">{escape(s.label)}</text>')
        x -= 34
    return parts


def _hover(drawn: list[Series], x_label: str, px) -> list[str]:
    """Upright bands, one per x, that show a guide line and a title."""
    xs = sorted({x for s in drawn for x, _ in s.points})
    values = [dict(s.points) for s in drawn]
    parts = []
    for before, x, after in zip([xs[:1], *([x] for x in xs)], xs, [*([x] for x in xs[1:]), xs[-1:]]):
        left, right = (px(before[0]) + px(x)) / 2, (px(after[0]) + px(x)) / 2
        lines = [f"{x_label} {number(round(x))}"]
        lines += [f"{s.label}: {known[x]:.4g}" for s, known in zip(drawn, values) if x in known]
        parts.append(
            f'<g class="hit"><rect x="{left:.1f}" y="{TOP}" width="{max(right - left, 1):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"/><line x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}"/><title>{escape(chr(10).join(lines))}</title></g>'
        )
    return parts
