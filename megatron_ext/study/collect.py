"""Collects the finished runs of a study into one file of results."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.analysis.results import Metric, Results, Row
from megatron_ext.files import write_json
from megatron_ext.study import state, steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Study

_SECONDARY = ("POPE-A", "POPE-P", "POPE-R", "POPE-yes", "MJHQ-facts, others' prompts", "MJHQ-facts, difference")
"""Figures that stay out of averages: POPE-F1 and MJHQ-facts already stand for the same answers and pictures."""
_POINTS = ("chance-corrected", "difference")
"""Ends of names of figures that may be 0 or less."""


def collect(study: Study, runs: Sequence[StudyRun]) -> Results:
    """Write the results of the finished runs to ``OUT/results.json``, in the order of the runs, and return them."""
    results = Results(f"study {study.name}")
    for budget in study.budgets:
        for run in runs:
            result = state.result(run, steps.fingerprint(run, study.evaluation))
            if result and budget in run.budgets:
                results.rows += _rows(study, run, result, budget)
    names = dict.fromkeys(name for row in results.rows for name in row.metrics)
    results.metrics = {
        name: Metric(**(dataclasses.asdict(_guess(name)) | study.metrics.get(name, {}))) for name in names
    }
    write_json(Path(study.output) / "results.json", dataclasses.asdict(results))
    return results


def _rows(study: Study, run: StudyRun, result: dict, budget: str) -> list[Row]:
    """A row per ``evaluate_as`` entry; the first that keeps the roles of training has no name."""
    rows = []
    trained = next(name for name, overrides in study.evaluation.evaluate_as.items() if not overrides)
    for name in steps.roles_of(run, study.evaluation):
        own = name in steps.untrained_roles(run, study.evaluation)
        figures = ({} if own else result["losses"]) | result["evaluated"].get(name, {})
        if not figures:
            continue
        rows.append(
            Row(
                method=run.method.label or run.method.name,
                task=run.method.trained_on,
                partner_group=run.method.partner_group,
                metrics=figures,
                flops_ratio=result["flops_ratio"],
                seed=run.seed,
                size=run.size.name,
                parameters=run.length.parameters,
                budget=budget,
                evaluated_as=None if name == trained else name,
                iterations=result["iterations"],
                tokens=result["tokens"],
                flops=result["flops"],
                run=run.name,
            )
        )
    return rows


def _guess(name: str) -> Metric:
    """How to read a figure, guessed from its name; losses stay out of the average over benchmarks."""
    if name.endswith(" loss"):
        return Metric(name.removesuffix(" loss"), higher_is_better=False, in_average=False)
    scale = "points" if name.endswith(_POINTS) else "log"
    counts = name not in _SECONDARY
    if "FID" in name or name.startswith("MJHQ"):
        return Metric("generation", higher_is_better="FID" not in name, in_average=counts, scale=scale)
    return Metric("understanding", in_average=counts and "likelihood" not in name, scale=scale)
