"""Gradient alignment for people: a table, a heat map, scalars for charts."""

from collections.abc import Mapping
from pathlib import Path


def scalars(alignment: Mapping) -> dict[str, float]:
    """For charts: of each layer the mean of its parts' cosines, and the cosine over the whole model."""
    made = {}
    for layer, cosines in enumerate(zip(*(of["cosine"] for of in alignment["layers"].values()))):
        known = [c for c in cosines if c is not None]
        if known:
            made[f"layer_{layer:02}"] = sum(known) / len(known)
    if alignment["all"]["cosine"] is not None:
        made["all"] = alignment["all"]["cosine"]
    return made


def line(alignment: Mapping, interval: int, step_seconds: float) -> str:
    """What was found and what it costs when measured every ``interval`` steps."""
    seconds, cosine = alignment["seconds"], alignment["all"]["cosine"]
    share = seconds / (seconds + interval * step_seconds)
    found = "not defined (a task has no gradient)" if cosine is None else f"cosine {cosine:+.3f}"
    return (
        f"gradient alignment {found} ({seconds:.1f} s; every {interval} iterations that is {100 * share:.0f} % of time)"
    )


def table(alignment: Mapping, corrected: Mapping | None = None) -> str:
    """Cosines by layer and part; beneath them, for each part, norms and shares of parameters by task. With
    ``corrected`` (:func:`gradients.corrected`) the cosines of whole layers are shown without noise too."""
    parts = alignment["layers"]
    widths = [max(7, len(name)) for name in parts]
    rows = [["cosine".ljust(11), *(name.rjust(w) for name, w in zip(parts, widths)), "  layer"]]
    for number, whole in enumerate(alignment["layer"]["cosine"]):
        cells = [_signed(of["cosine"][number]).rjust(w) for of, w in zip(parts.values(), widths)]
        rows.append([f"layer {number}".ljust(11), *cells, _signed(whole).rjust(7)])
    lines = ["  ".join(row) for row in rows]
    if corrected:
        lines[0] += "  without noise (halves of the rows agree: understanding, generation)"
        for number in range(len(alignment["layer"]["cosine"])):
            cosine, *repeats = (_signed(values[number]) for values in corrected["layer"].values())
            lines[1 + number] += f"  {cosine:>13} ({', '.join(repeats)})"
    lines += [
        "",
        f"{'':24}cosine  |understanding|  |generation|  trained by one task alone (understanding, generation)",
    ]
    for name, of in parts.items():
        figures = {key: _mean(values) for key, values in of.items()}
        lines.append(_row(f"{name}, mean of layers", figures))
    lines += [_row(name, figures) for name, figures in [*alignment["outside"].items(), ("all", alignment["all"])]]
    return "\n".join(lines)


def draw(alignment: Mapping, file: Path, title: str) -> None:
    """A PNG: cosines, and the share of parameters that one task trains alone, by layer and part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = alignment["layers"]
    cosines = [of["cosine"] for of in parts.values()]
    alone = [[u + g for u, g in zip(of["only_understanding"], of["only_generation"])] for of in parts.values()]
    layers = len(cosines[0])
    size = (min(16, 4.5 + 0.9 * layers), 1.9 + 0.62 * len(parts))
    figure, panels = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    pictures = (
        (panels[0], cosines, "cosine of the two tasks' gradients", {"cmap": "RdBu", "vmin": -1, "vmax": 1}),
        (panels[1], alone, "share of parameters that one task trains alone", {"cmap": "Greys", "vmin": 0, "vmax": 1}),
    )
    for panel, values, heading, colours in pictures:
        numbers = [[float("nan") if v is None else v for v in row] for row in values]
        picture = panel.imshow(numbers, aspect="auto", **colours)
        panel.set_facecolor("#f3e9c6")  # not defined
        panel.set(xlabel="layer", xticks=range(layers), yticks=range(len(parts)), yticklabels=list(parts))
        panel.set_title(heading, fontsize=10)
        figure.colorbar(picture, ax=panel, fraction=0.05)
        for y, row in enumerate(values if layers <= 16 else ()):
            for x, value in enumerate(row):
                ink = "black" if value is None or abs(value) < 0.6 else "white"
                panel.text(
                    x, y, "-" if value is None else f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7
                )
    figure.suptitle(title, fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)


def _row(name: str, figures: Mapping) -> str:
    u, g = (f"{figures[key]:.3g}" for key in ("norm_understanding", "norm_generation"))
    alone = (f"{100 * figures[key]:.1f} %" for key in ("only_understanding", "only_generation"))
    return f"{name:22}  {_signed(figures['cosine'])}  {u:>15}  {g:>12}  {', '.join(alone)}"


def _mean(values: list) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _signed(value: float | None) -> str:
    return "     -" if value is None else f"{value:+.3f}"
