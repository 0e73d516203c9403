"""Gradient alignment as scalars for charts, a line for the log, a table and a heat map.

pandas and matplotlib are imported late: training logs the scalars and needs neither.
"""

from collections.abc import Mapping
from pathlib import Path


def scalars(alignment: Mapping) -> dict[str, float]:
    """For charts: the mean cosine over each layer's parts, and the cosine over the whole model."""
    curves = {}
    for layer, cosines in enumerate(zip(*(part["cosine"] for part in alignment["layers"].values()))):
        defined = [c for c in cosines if c is not None]
        if defined:
            curves[f"layer_{layer:02}"] = sum(defined) / len(defined)
    if alignment["all"]["cosine"] is not None:
        curves["all"] = alignment["all"]["cosine"]
    return curves


def line(alignment: Mapping, interval: int, step_seconds: float) -> str:
    """The cosine, and the cost of measuring it every ``interval`` steps."""
    seconds, cosine = alignment["seconds"], alignment["all"]["cosine"]
    share = seconds / (seconds + interval * step_seconds)
    text = "not defined (a task has no gradient)" if cosine is None else f"cosine {cosine:+.3f}"
    return (
        f"gradient alignment {text} ({seconds:.1f} s; every {interval} iterations that is {100 * share:.0f} % of time)"
    )


def table(alignment: Mapping, corrected: Mapping | None = None) -> str:
    """Cosines by layer and part, then the norms and the shares of parameters by task of each part.

    Args:
        corrected: of :func:`gradients.corrected`; adds the cosines of whole layers without noise.
    """
    import pandas as pd

    cosines = pd.DataFrame({name: part["cosine"] for name, part in alignment["layers"].items()})
    cosines["layer"] = alignment["layer"]["cosine"]
    cosines.index = [f"layer {number}" for number in cosines.index]
    if corrected:
        columns = {"corrected_cosine": "without noise"}
        columns |= {f"repeat_{task}": f"{task} halves agree" for task in ("understanding", "generation")}
        cosines = cosines.assign(**{name: corrected["layer"][key] for key, name in columns.items()})

    means = pd.DataFrame(
        {
            f"{name}, mean of layers": pd.DataFrame(part).astype(float).mean()
            for name, part in alignment["layers"].items()
        }
    ).T
    parts = pd.concat([means, pd.DataFrame({**alignment["outside"], "all": alignment["all"]}).T.astype(float)])
    shares = [f"only_{task}" for task in ("understanding", "generation")]
    parts[shares] *= 100
    norms = {f"norm_{task}": f"|{task}|" for task in ("understanding", "generation")}
    alone = {share: f"{share.replace('_', ' ')} (%)" for share in shares}
    parts = parts[["cosine", *norms, *shares]].rename(columns=norms | alone)
    formats = dict.fromkeys(norms.values(), "{:.3g}".format) | dict.fromkeys(alone.values(), "{:.1f}".format)
    return "\n\n".join(
        [
            f"cosines\n{cosines.astype(float).to_string(float_format='{:+.3f}'.format, na_rep='-')}",
            parts.to_string(formatters=formats | {"cosine": "{:+.3f}".format}, na_rep="-"),
        ]
    )


def plot(alignment: Mapping, file: Path, title: str) -> None:
    """Plot the cosines, and the share of parameters that one task trains alone, by layer and part."""
    from megatron_ext.analysis import plots

    parts = alignment["layers"]
    cosines = [part["cosine"] for part in parts.values()]
    alone = [[u + g for u, g in zip(part["only_understanding"], part["only_generation"])] for part in parts.values()]
    layers = len(cosines[0])
    size = (min(16, 4.5 + 0.9 * layers), 1.9 + 0.62 * len(parts))
    figure, panels = plots.subplots(1, 2, figsize=size, sharey=True)
    heat_maps = (
        (panels[0], cosines, "cosine of the two tasks' gradients", {"cmap": "RdBu", "vmin": -1, "vmax": 1}),
        (panels[1], alone, "share of parameters that one task trains alone", {"cmap": "Greys", "vmin": 0, "vmax": 1}),
    )
    for panel, values, heading, colors in heat_maps:
        numbers = [[float("nan") if v is None else v for v in row] for row in values]
        image = panel.imshow(numbers, aspect="auto", **colors)
        panel.set_facecolor("#f3e9c6")  # not defined
        panel.set(xlabel="layer", xticks=range(layers), yticks=range(len(parts)), yticklabels=list(parts))
        panel.set_title(heading, fontsize=10)
        figure.colorbar(image, ax=panel, fraction=0.05)
        for y, row in enumerate(values if layers <= 16 else ()):
            for x, value in enumerate(row):
                ink = "black" if value is None or abs(value) < 0.6 else "white"
                panel.text(
                    x, y, "-" if value is None else f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7
                )
    figure.suptitle(title, fontsize=11)
    plots.save(figure, file)
