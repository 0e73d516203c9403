"""Attention allocation as a table and as a figure."""

from collections.abc import Mapping
from pathlib import Path

TASKS = {
    "answer": "understanding: queries that predict the answer",
    "answer_about_object": "understanding: answers about an object",
    "image": "generation: queries of image tokens",
    "image_of_object": "generation: image tokens of an object",
}
"""The sets of queries that are plotted side by side."""

COLORS = {
    "its object": "#1f3f73",
    "image": "#3b6fb6",
    "rest of image": "#3b6fb6",
    "given image": "#8db4e2",
    "drawn image": "#8db4e2",
    "answer": "#5a9e5a",
    "question": "#e08a3c",
    "caption": "#e08a3c",
    "own answer": "#5a9e5a",
    "earlier answers": "#a8cf9a",
    "special": "#9a9a9a",
}


def table(allocation: Mapping, untrained: Mapping | None = None) -> str:
    """A row per layer for each set of queries of ``Allocation.result``: mass by class of key in %, and in parentheses
    mass over uniform, also that of an ``untrained`` allocation; entropy; attention left out."""
    import pandas as pd

    parts = ["mass (over uniform" + (", the same of the untrained model)" if untrained else ")")]
    for name, figures in allocation.items():
        others = untrained[name]["layers"] if untrained else [None] * len(figures["layers"])
        rows = [_row(layer, other) for layer, other in zip(figures["layers"], others)]
        text = pd.DataFrame(rows).rename_axis("layer").to_string()
        parts.append(f"{name.replace('_', ' ')} ({figures['queries']} queries)\n{text}")
    return "\n\n".join(parts)


def _row(layer: Mapping, untrained: Mapping | None) -> dict[str, str]:
    cells = {}
    for key_class, mass in layer["mass"].items():
        models = [layer, untrained] if untrained else [layer]
        ratios = ", ".join(_format("{:.2f}", model["over_uniform"][key_class]) for model in models)
        cells[key_class] = "-" if mass is None else f"{100 * mass:.1f}% ({ratios})"
    cells["entropy"] = _format("{:.2f}", layer["entropy"])
    share, left_out = (layer[name] and 100 * layer[name] for name in ("entropy_share", "left_out"))
    return cells | {"of uniform": _format("{:.1f}%", share), "left out": _format("{:.1f}%", left_out)}


def _format(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)


def plot(allocation: Mapping, file: Path, title: str, untrained: Mapping | None = None) -> None:
    """Plot the sets of queries side by side: mass per layer and class of key above, mass over uniform below, there also
    of an ``untrained`` allocation (thin)."""
    import matplotlib.ticker

    from megatron_ext.analysis import plots

    sets = {name: heading for name, heading in TASKS.items() if name in allocation}
    figure, panels = plots.subplots(2, len(sets), figsize=(5.5 * len(sets), 6.4), sharex=True, sharey="row")
    for (name, heading), (above, below) in zip(sets.items(), panels.T):
        layers = allocation[name]["layers"]
        numbers = [n for n, layer in enumerate(layers) if layer["queries"]]
        bottom = [0.0] * len(numbers)
        for key_class in layers[0]["mass"]:
            mass = [layers[n]["mass"][key_class] for n in numbers]
            above.bar(numbers, mass, bottom=bottom, width=0.86, color=COLORS[key_class], label=key_class)
            bottom = [a + b for a, b in zip(bottom, mass)]
            style = {"color": COLORS[key_class], "marker": "o", "linewidth": 1.5, "markersize": 4}
            below.plot(numbers, _over_uniform(layers, numbers, key_class), **style)
            if untrained:
                style |= {"linewidth": 0.8, "markersize": 2, "alpha": 0.7, "linestyle": "--"}
                below.plot(numbers, _over_uniform(untrained[name]["layers"], numbers, key_class), **style)
        below.axhline(1, color="black", linewidth=0.8, linestyle=":")
        empty = [n for n, layer in enumerate(layers) if allocation[name]["queries"] and not layer["queries"]]
        for n in empty:
            above.text(n, 0.5, "no queries in this layer", rotation=90, ha="center", va="center", fontsize=8)
        above.set(title=f"{heading} ({allocation[name]['queries']:,})", ylim=(0, 1))
        above.title.set_fontsize(10)
        above.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=5, frameon=False)
        below.set(xlabel="layer", yscale="log", xlim=(-0.6, len(layers) - 0.4))
        below.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        below.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        below.grid(alpha=0.3)
    panels[0, 0].set_ylabel("attention mass")
    panels[1, 0].set_ylabel("mass over uniform" + (" (dashed: untrained)" if untrained else ""))
    figure.suptitle(title, fontsize=11)
    plots.save(figure, file)


def _over_uniform(layers: list[Mapping], numbers: list[int], key_class: str) -> list[float]:
    return [layers[n]["over_uniform"].get(key_class) or float("nan") for n in numbers]
