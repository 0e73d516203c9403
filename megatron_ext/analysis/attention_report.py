"""Attention allocation as a table and as a figure."""

from collections.abc import Mapping
from pathlib import Path

TASKS = {"answer": "understanding: queries that predict the answer", "image": "generation: queries of image tokens"}
"""The sets of queries that are plotted side by side."""

COLORS = {
    "image": "#3b6fb6",
    "given image": "#8db4e2",
    "drawn image": "#8db4e2",
    "answer": "#5a9e5a",
    "question": "#e08a3c",
    "caption": "#e08a3c",
    "own answer": "#5a9e5a",
    "earlier answers": "#a8cf9a",
    "special": "#9a9a9a",
}


def table(allocation: Mapping) -> str:
    """Mass per layer and class of key, in %, and entropy, for each set of queries of ``Allocation.result``."""
    import pandas as pd

    parts = []
    for name, figures in allocation.items():
        layers = pd.DataFrame(figures["layers"])
        columns = pd.DataFrame(list(layers["mass"])) * 100
        columns["entropy"] = layers["entropy"]
        columns["of uniform"] = layers["entropy_share"] * 100
        formats = dict.fromkeys(columns, "{:.1f}%".format) | {"entropy": "{:.2f}".format}
        text = columns.astype(float).rename_axis("layer").to_string(formatters=formats, na_rep="-")
        parts.append(f"{name.replace('_', ' ')} ({figures['queries']} queries)\n{text}")
    return "\n\n".join(parts)


def plot(allocation: Mapping, file: Path, title: str) -> None:
    """Plot both tasks side by side: mass per layer and class of key above, mass over uniform below."""
    import matplotlib.ticker

    from megatron_ext.analysis import plots

    figure, panels = plots.subplots(2, 2, figsize=(11, 6.4), sharex=True, sharey="row")
    for (name, heading), (above, below) in zip(TASKS.items(), panels.T):
        layers = allocation[name]["layers"]
        numbers = [n for n, layer in enumerate(layers) if layer["queries"]]
        bottom = [0.0] * len(numbers)
        for key_class in layers[0]["mass"]:
            mass = [layers[n]["mass"][key_class] for n in numbers]
            above.bar(numbers, mass, bottom=bottom, width=0.86, color=COLORS[key_class], label=key_class)
            bottom = [a + b for a, b in zip(bottom, mass)]
            over_uniform = [layers[n]["over_uniform"][key_class] or float("nan") for n in numbers]
            below.plot(numbers, over_uniform, color=COLORS[key_class], marker="o", markersize=4, linewidth=1.5)
        below.axhline(1, color="black", linewidth=0.8, linestyle=":")
        empty = [n for n, layer in enumerate(layers) if allocation[name]["queries"] and not layer["queries"]]
        for n in empty:
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
    plots.save(figure, file)
