"""Causal depth curves: what a trained model loses if its image tokens take no part, or less, from layer K on.

Attention shows where a model looks, not what it needs. For that, a study evaluates trained models with other roles than
those of training (``evaluate_as`` of a method): as ``himix_from_K`` the image tokens of understanding only give keys
and values from layer K on, as ``skip_from_K`` the image tokens of generation skip all layers from K on. The weights are
the same, so any difference is an effect of what the tokens would have done there.

Figures are compared with those of the same seed under the roles of training, and a *trend* is the least-squares slope
of a seed's scores over K; both then have one number per seed (:mod:`~megatron_ext.analysis.statistics`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megatron_ext.analysis.results import Metric, Results, Row
from megatron_ext.analysis.statistics import Estimate, t_interval

INTERVENTIONS = {
    "himix_from": ("understanding", "images of understanding give keys and values alone from layer K on"),
    "skip_from": ("generation", "images of generation skip the layers from K on"),
}
"""The name before ``_K``: the task whose documents it changes, and what it does."""
UNTRAINED = "untrained"
"""The method whose runs are not trained."""
LEAST_SEEDS = 5
"""Seeds that a test of a trend needs."""

_NAME = re.compile(rf"({'|'.join(INTERVENTIONS)})_(\d+)")


@dataclass(frozen=True)
class Curve:
    """One metric of one model over K.

    Attributes:
        intervention: of :data:`INTERVENTIONS`.
        scale: of changes and trend: ``log`` points (100 ln) or ``points``; above 0 is always better.
        seeds: those with a figure for every K and for the roles of training.
        layers: K, ascending.
        figures: K -> the figure of each seed, in the order of ``seeds``.
        trained: the figures with the roles of training.
        changes: K -> the score minus that with the roles of training.
        trend: slope of the score per layer; None for a single K. Its p is None with fewer than 5 seeds.
        untrained: K -> the mean figure of the untrained model, of any budget; empty without one.
    """

    size: str | None
    budget: str | None
    method: str
    intervention: str
    metric: str
    scale: str
    seeds: tuple[int | None, ...]
    layers: tuple[int, ...]
    figures: Mapping[int, tuple[float, ...]]
    trained: tuple[float, ...]
    changes: Mapping[int, Estimate]
    trend: Estimate | None
    untrained: Mapping[int, float]

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.seeds)


def is_intervention(row: Row) -> bool:
    """Whether a row is a point of a depth curve; such rows are for these curves alone."""
    return _NAME.fullmatch(row.evaluated_as or "") is not None


def curves(results: Results) -> list[Curve]:
    """The curves of all methods but the untrained one: of the loss of the task that the intervention changes, and of
    its metrics that are corrected for chance. A run of several budgets counts to the first."""
    budget_of = {row.run: row.budget for row in reversed(results.rows) if row.run}
    rows = {
        (row.size, row.budget, row.method, row.task, row.evaluated_as, row.seed): row
        for row in results.rows
        if budget_of.get(row.run, row.budget) == row.budget
    }
    models = dict.fromkeys(key[:4] for key, row in rows.items() if is_intervention(row) and row.method != UNTRAINED)
    curves = []
    for size, budget, method, task in models:
        own = {key[4:]: row for key, row in rows.items() if key[:4] == (size, budget, method, task)}
        for intervention, (changed_task, _) in INTERVENTIONS.items():
            of_task = {name: meaning for name, meaning in results.metrics.items() if meaning.task == changed_task}
            for metric, meaning in of_task.items():
                outcome = metric == f"{changed_task} loss" or metric.endswith("chance-corrected")
                if outcome and (points := _points(own, intervention, metric, meaning)):
                    untrained = _untrained(results, size, intervention, metric, points["layers"])
                    curves.append(
                        Curve(size, budget, method, intervention, metric, meaning.scale, **points, untrained=untrained)
                    )
    return curves


def by_model(found: Sequence[Curve]) -> dict[tuple[str | None, str | None, str], list[Curve]]:
    """The curves by size, budget and method."""
    models = {}
    for curve in found:
        models.setdefault((curve.size, curve.budget, curve.method), []).append(curve)
    return models


def _points(rows: Mapping, intervention: str, metric: str, meaning: Metric) -> dict | None:
    """The points of one model's curve from its rows by (evaluated_as, seed); None without a seed that has all."""
    layers = sorted({int(m[2]) for name, _ in rows if (m := _NAME.fullmatch(name or "")) and m[1] == intervention})
    by_seed = {}
    for seed in dict.fromkeys(seed for _, seed in rows):
        of_seed = [rows.get((None, seed)), *(rows.get((f"{intervention}_{layer}", seed)) for layer in layers)]
        figures = [row and row.metrics.get(metric) for row in of_seed]
        if layers and all(meaning.score(figure) is not None for figure in figures):
            by_seed[seed] = figures
    if not by_seed:
        return None
    figures = np.array(list(by_seed.values()))  # [seeds, 1 + layers]
    scores = np.array([[meaning.score(figure) for figure in of_seed] for of_seed in by_seed.values()])
    changes = scores[:, 1:] - scores[:, :1]
    return {
        "seeds": tuple(by_seed),
        "layers": tuple(layers),
        "figures": {layer: tuple(column.tolist()) for layer, column in zip(layers, figures[:, 1:].T)},
        "trained": tuple(figures[:, 0].tolist()),
        "changes": {layer: t_interval(column) for layer, column in zip(layers, changes.T)},
        "trend": _trend(np.array(layers, float), scores[:, 1:]),
    }


def _trend(layers: np.ndarray, scores: np.ndarray) -> Estimate | None:
    """The slope of scores [seeds, layers] over ``layers``."""
    if len(layers) < 2:
        return None
    centred = layers - layers.mean()
    estimate = t_interval(scores @ centred / (centred @ centred))
    return estimate if estimate.n >= LEAST_SEEDS else Estimate(**(asdict(estimate) | {"p": None}))


def _untrained(
    results: Results, size: str | None, intervention: str, metric: str, layers: tuple[int, ...]
) -> dict[int, float]:
    """The untrained model's mean figure for each K; that with its own roles where it was not evaluated otherwise."""
    rows = [row for row in results.rows if row.method == UNTRAINED and row.size == size]
    means = {}
    for layer in layers:
        own = [row for row in rows if row.evaluated_as == f"{intervention}_{layer}"]
        own = own or [row for row in rows if row.evaluated_as is None]
        figures = [figure for row in own if (figure := row.metrics.get(metric)) is not None]
        if figures:
            means[layer] = float(np.mean(figures))
    return means
