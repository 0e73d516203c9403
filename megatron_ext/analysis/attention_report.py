"""Attention allocation for people: a table and a figure."""

from collections.abc import Mapping
from pathlib import Path

TASKS = {"answer": "understanding: queries that predict the answer", "image": "generation: queries of image tokens"}
"""The sets of queries that stand side by side."""

COLOURS = {
    "image": "#3b6fb6",
    "question": "#e08a3c",
    "caption": "#e08a3c",
    "own answer": "#5a9e5a",
    "earlier answers": "#a8cf9a",
    "special": "#9a9a9a",
}


def table(allocation: Mapping) -> str:
    """Mass per layer and class of key, in %, with entropy, for each set of queries of ``Allocation.result``."""
    lines = []
    for name, of in allocation.items():
        classes = list(of["layers"][0]["mass"])
        lines += ["", f"{name.replace('_', ' ')} ({of['queries']} queries)"]
        lines.append("  ".join(["layer", *(c.rjust(7) for c in classes), "entropy", "of uniform"]))
        for number, layer in enumerate(of["layers"]):
            shares = [_cell(layer["mass"][c], 100, "%", max(7, len(c))) for c in classes]
            entropy = [_cell(layer["entropy"], 1, "", 7, 2), _cell(layer["entropy_share"], 100, "%", 10)]
            lines.append("  ".join([f"{number:5d}", *shares, *entropy]))
    return "\n".join(lines[1:])


def draw(allocation: Mapping, file: Path, title: str) -> None:
    """A PNG of both tasks side by side: above each layer's mass by class of key, below that mass over uniform."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 6.4), sharex=True, sharey="row", layout="constrained")
    for (name, heading), (above, below) in zip(TASKS.items(), panels.T):
        layers = allocation[name]["layers"]
        numbers = [n for n, layer in enumerate(layers) if layer["queries"]]
        filled = [0.0] * len(numbers)
        for of_key in layers[0]["mass"]:
            mass = [layers[n]["mass"][of_key] for n in numbers]
            above.bar(numbers, mass, bottom=filled, width=0.86, color=COLOURS[of_key], label=of_key)
            filled = [a + b for a, b in zip(filled, mass)]
            over = [layers[n]["over_uniform"][of_key] or float("nan") for n in numbers]
            below.plot(numbers, over, color=COLOURS[of_key], marker="o", markersize=4, linewidth=1.5)
        below.axhline(1, color="black", linewidth=0.8, linestyle=":")
        absent = [n for n, layer in enumerate(layers) if allocation[name]["queries"] and not layer["queries"]]
        for n in absent:
            above.text(n, 0.5, "no queries in this layer", rotation=90, ha="center", va="center", fontsize=8)
        above.set(title=f"{heading} ({allocation[name]['queries']:,})", ylim=(0, 1))
        above.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=5, frameon=False)
        below.set(xlabel="layer", yscale="log", xlim=(-0.6, len(layers) - 0.4))
        below.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        below.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        below.grid(alpha=0.3)
    panels[0, 0].set_ylabel("attention mass")
    panels[1, 0].set_ylabel("mass over uniform")
    figure.suptitle(title, fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)


def _cell(value: float | None, scale: float, unit: str, width: int, digits: int = 1) -> str:
    return ("-" if value is None else f"{scale * value:.{digits}f}{unit}").rjust(width)
