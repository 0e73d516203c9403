"""The report of a search, in Markdown."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from megatron_ext.analysis import tables
from megatron_ext.analysis.statistics import LEVEL
from megatron_ext.analysis.synergy import PRIMARY

ROUNDING = 1e-6
"""Log ratios up to this are those of documents that a change does not concern."""
SHOWN = 8
"""Tables of each arm that are listed."""


def markdown(numbers: dict) -> str:
    """The report.

    Args:
        numbers: what ``OUT/search.json`` has (:func:`megatron_ext.role_search.figures.collect`).
    """
    settings, spent = numbers["settings"], numbers["spent"]
    parts = [
        f"# Role search: {settings['name']}",
        f"Tables cost at most {settings['cost']:g} of the FLOPs of lossless dense. Changes of loss are log ratios in "
        "per cent: 1 is a loss that is 1 % higher.",
        "## On fresh seeds",
        _fresh(numbers),
        "## The best table of each arm",
        *(f"{name} ({arm}):\n\n{_roles(numbers['tables'][name]['plan'])}" for arm, name in numbers["best"].items()),
        "## Change of loss for a single role",
        f"With the model whose documents drew {settings['drawn']['tables']} tables, on the same "
        f"{settings['drawn']['rows']} rows for every table. *Saves* is the part of lossless dense's FLOPs.",
        _changes(numbers["changes"]),
        "## Tables",
        f"The best {SHOWN} of each arm. Every figure is the log ratio, to the plan without changes, of the task that "
        "is worse: *predicted* adds up single changes, without those below 0; *together* is measured with the same "
        "model; in the rungs that model was trained further under each table.",
        _tables(numbers["tables"], len(settings["rungs"])),
        _distances(numbers["distances"]),
        "## Rank correlations",
        "Between consecutive stages, and the range of these figures in each stage. Read the column *all* of the first "
        "two pairs: each arm alone, and later rungs, have tables that are few or much alike.",
        _by_arm(numbers["rank_correlations"], "Spearman's", _number),
        _by_arm(numbers["orders"], "range", lambda ends: " to ".join(map(_percent, ends or ()))),
        "## What it took",
        _spent(spent),
    ]
    return "\n\n".join(parts) + "\n"


def _fresh(numbers: dict) -> str:
    rows = []
    for name, comparison in numbers["fresh"]["comparisons"].items():
        row = [name, f"{comparison['flops_ratio']:.3f}"]
        for loss in PRIMARY:
            estimate, equivalence = comparison[loss]["estimate"], comparison[loss]["equivalence"]
            shown = equivalence["holm"] is not None and equivalence["holm"] <= 1 - LEVEL
            row += [_interval(estimate), _number(estimate["holm"]), "yes" if shown else "not shown"]
        rows.append(row)
    columns = ["", "FLOPs", *(name for loss in PRIMARY for name in (loss, "p", "within 3 %"))]
    seeds = ", ".join(map(str, numbers["settings"]["report"]["seeds"]))
    return (
        f"Seeds that the search did not use, {seeds}, and the validation rows that it used: 95 % t-intervals over the "
        "seeds, p of a difference, and equivalence tests. Both tests are Holm-adjusted over the intervals shown.\n\n"
        + tables.markdown(pd.DataFrame(rows, columns=columns))
    )


def _interval(estimate: dict) -> str:
    mean = _percent(estimate["mean"])
    return mean if estimate["low"] is None else f"{mean} [{_percent(estimate['low'])}, {_percent(estimate['high'])}]"


def _roles(plan: dict) -> str:
    rows = [[str(entry[k]) for k in ("layers", "task", "modality", "role")] for entry in plan.get("table", [])]
    return tables.markdown(pd.DataFrame(rows, columns=["layers", "task", "modality", "role"]))


def _changes(changes: Sequence[dict]) -> str:
    rows = []
    for change in changes:
        of_class = f"{change['task']} {change['modality']} {change['role']}"
        cells = []
        for task, value in change["change"].items():
            error = change["standard_error"][task]
            shown = _percent(value) + ("" if error is None else f" ± {100 * error:.2f}")
            cells.append(shown if abs(value) > ROUNDING else "0")
        rows.append([of_class, str(change["layer"]), f"{100 * change['saves']:.1f} %", *cells])
    rows.sort(key=lambda row: (row[0], int(row[1])))
    tasks = list(changes[0]["change"])
    return tables.markdown(pd.DataFrame(rows, columns=["role", "layer", "saves", *tasks]))


def _tables(of_name: dict[str, dict], rungs: int) -> str:
    rows = []
    for arm in ("searched", "random"):
        names = [name for name in of_name if name.startswith(arm)]
        names.sort(key=lambda name: (-len(of_name[name]["rungs"]), _last_score(of_name[name])))
        for name in names[:SHOWN]:
            table = of_name[name]
            scores = ["" if rung["score"] is None else _percent(rung["score"]) for rung in table["rungs"]]
            scores += [""] * (rungs - len(scores))
            changes = [_percent(table[how]) for how in ("predicted", "measured")]
            rows.append([name, f"{table['cost']:.3f}", *changes, *scores])
    columns = ["table", "cost", "predicted", "together", *(f"rung {number + 1}" for number in range(rungs))]
    return tables.markdown(pd.DataFrame(rows, columns=columns))


def _last_score(table: dict) -> float:
    score = table["rungs"][-1]["score"] if table["rungs"] else table["measured"]
    return math.inf if score is None else score


def _distances(of_arm: dict[str, dict | None]) -> str:
    return "\n".join(
        f"The {arm} tables trained differ in {found['mean']:.1f} entries on average, at least in {found['least']}."
        for arm, found in of_arm.items()
        if found
    )


def _by_arm(of_row: dict[str, dict], title: str, cell: Callable[[Any], str]) -> str:
    rows = [[name, *map(cell, of_arm.values())] for name, of_arm in of_row.items()]
    arms: Iterable[str] = next(iter(of_row.values()))
    return tables.markdown(pd.DataFrame(rows, columns=[title, *arms]))


def _spent(spent: dict) -> str:
    arms = ", ".join(
        f"the rungs of the {arm} arm {spent['rungs_flops'][arm]:.3g} over {trained} tables"
        for arm, trained in spent["tables_trained"].items()
    )
    return (
        f"FLOPs: the drawn model {spent['drawn_flops']:.3g}, measuring {spent['tables_measured']} tables with it about "
        f"{spent['measuring_flops']:.3g}, {arms}, the plan without changes beside them "
        f"{spent['rungs_flops']['unchanged']:.3g}, the fresh seeds {spent['fresh_flops']:.3g}; {spent['runs']} runs."
    )


def _percent(value: float) -> str:
    return f"{100 * value:+.2f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
