"""Results beside the tables of arXiv 2606.01503: understanding alone, generation alone, both; and synergy losses.

Absolute figures of other data or another size of model are not comparable; what a method changes against dense is, so
every reduced model's figure is followed by it, in percent, positive where the method is better. So are the two parts of
a synergy loss, which follow from the three tables.
"""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from megatron_ext.analysis import results, synergy
from megatron_ext.analysis.results import Metric, Results, Row
from megatron_ext.analysis.synergy import QUANTITIES, REFERENCE, Comparison, gain
from megatron_ext.analysis.tables import signed

TABLES = {
    "understanding": "Table 1: trained on understanding alone",
    "generation": "Table 2: trained on generation alone",
    "unified": "Table 3: trained on both",
}
SPLIT = "Table 3's synergy losses, split into unified cost + partner advantage (log points, 100 ln)"
_SAME = {"SEED": "SEED-Img"}
"""Our name of a metric -> the paper's."""
_SAME_METHODS = {"Share All": "HiMix-HMGen (Share All)", "Share Partial": "HiMix-HMGen (Share Partial)"}
"""Our name of a method -> the paper's."""
_OUR_NAME = {theirs: our for our, theirs in _SAME.items()}
_PARTS = {quantity: name for quantity, name in QUANTITIES.items() if quantity != "synergy"}


def tables(ours: Results) -> list[tuple[str, pd.DataFrame]]:
    """(title, table) of each of the paper's tables with a reduced method in ``ours``, for each of our settings (size,
    budget, roles in evaluation); rows are found by the method's name and the task trained on, and averaged over seeds.
    """
    paper = results.published()
    renamed = [replace(row, method=_SAME_METHODS.get(row.method, row.method)) for row in ours.rows]
    ours = replace(ours, rows=renamed)
    settings = dict.fromkeys(row.setting for row in ours.rows)
    of_paper, of_ours = synergy.compare(paper), synergy.compare(ours)
    shown = []
    for setting in settings:
        of_setting = [row for row in ours.rows if row.setting == setting]
        suffix = ", ".join(str(x) for x in setting if x) if len(settings) > 1 else ""
        for task, title in TABLES.items():
            table = _table(_of_task(paper.rows, task), _of_task(of_setting, task), paper.metrics | ours.metrics)
            if table is not None:
                shown.append((f"{title} ({suffix})" if suffix else title, table))
        if not (split := _split(of_paper, [c for c in of_ours if c.setting == setting])).empty:
            shown.append((f"{SPLIT} ({suffix})" if suffix else SPLIT, split))
    return shown


def _split(paper: Sequence[Comparison], ours: Sequence[Comparison]) -> pd.DataFrame:
    """A line for each reduced method that is also ours and each metric of either, with both sources' parts."""
    by_method = {c.method: c for c in ours if c.method != REFERENCE}
    shared = [(c, by_method[c.method]) for c in paper if c.method in by_method]
    effects = [e for pair in shared for c in pair for e in c.effects if e.counts]
    return pd.DataFrame(
        [
            {"metric": metric, "method": c.method}
            | {f"paper: {name}": signed(c.estimate(metric, q)) for q, name in _PARTS.items()}
            | {f"ours: {name}": signed(own.estimate(_OUR_NAME.get(metric, metric), q)) for q, name in _PARTS.items()}
            for metric in dict.fromkeys(_SAME.get(e.metric, e.metric) for e in effects)
            for c, own in shared
        ]
    )


def _of_task(rows: Sequence[Row], task: str) -> dict[str, list[Row]]:
    """The rows of the models trained on a task, by method."""
    chosen = [row for row in rows if row.task == task]
    return {
        method: [row for row in chosen if row.method == method] for method in dict.fromkeys(r.method for r in chosen)
    }


def _table(paper: dict, ours: dict, metrics: dict[str, Metric]) -> pd.DataFrame | None:
    """Two lines for each of the paper's methods; None if none of ours is reduced."""
    if not (paper.keys() & ours.keys()) - {REFERENCE}:
        return None
    figures = {source: {method: _means(rows) for method, rows in of.items()} for source, of in _both(paper, ours)}
    names = list(dict.fromkeys(name for of in figures.values() for means in of.values() for name in means))
    names = [
        name for name in names if _counts(name, metrics) or any(name in means for means in figures["paper"].values())
    ]
    lines = []
    for method in paper:
        for source, of in _both(paper, ours):
            ratio = _mean([row.flops_ratio for row in of.get(method, ())])
            line = {"method": method, "of": source, "FLOPs": "-" if ratio is None else f"{ratio:.2f}"}
            means, dense = figures[source].get(method, {}), figures[source].get(REFERENCE, {})
            reference = {} if method == REFERENCE else dense
            lines.append(line | {name: _cell(name, means, reference, metrics) for name in names})
    return pd.DataFrame(lines)


def _both(paper: dict, ours: dict) -> tuple[tuple[str, dict], tuple[str, dict]]:
    return ("paper", paper), ("ours", ours)


def _means(rows: Sequence[Row]) -> dict[str, float]:
    """Figures under the paper's names, averaged over seeds."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    means = {_SAME.get(name, name): _mean([row.metrics.get(name) for row in rows]) for name in names}
    return {name: mean for name, mean in means.items() if mean is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _counts(name: str, metrics: dict[str, Metric]) -> bool:
    return name in metrics and metrics[name].in_average


def _cell(name: str, means: dict[str, float], dense: dict[str, float], metrics: dict[str, Metric]) -> str:
    if name not in means:
        return "-"
    change = gain(means[name], dense[name], metrics[name].higher_is_better) if name in dense else None
    return f"{means[name]:.2f}" + ("" if change is None else f" ({100 * change:+.1f} %)")
