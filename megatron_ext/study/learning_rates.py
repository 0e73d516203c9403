"""The search for a learning rate of each method at each size: trials on a seed of its own, before the study's runs.

A trial is a run of the study in all but its seed, rate, length and folder (``OUT/learning_rates/NAME``), and answers no
benchmark. What was found follows from the finished trials alone; ``OUT/learning_rates.json`` only shows it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from megatron_ext.analysis import tables
from megatron_ext.errors import UserError
from megatron_ext.files import write_json
from megatron_ext.study import grid, state, steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Study


@dataclass(frozen=True)
class Search:
    """A method's search at a size.

    Attributes:
        losses: rate -> mean over the tasks trained on of the log of the validation loss, infinite where training
            diverged; of the trials that have ended.
        unfinished: number of the others.
    """

    size: str
    method: str
    losses: dict[float, float]
    unfinished: int

    @property
    def best(self) -> float | None:
        """The rate of the lowest loss; None before all rates were tried, and where training diverged with each."""
        return None if self.unfinished or self.has_diverged else min(self.losses, key=self.losses.get)

    @property
    def has_diverged(self) -> bool:
        """Whether all rates were tried, and training diverged with each."""
        return not self.unfinished and not any(map(math.isfinite, self.losses.values()))

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest of several, so that one beyond might be better."""
        return len(self.losses) > 1 and self.best in (min(self.losses), max(self.losses))


def trials(study: Study) -> list[StudyRun]:
    """The trials: for each size and method one per rate; none where the study has no ``learning_rates``.

    Raises:
        UserError: the configuration of a run is refused, or has no validation data to choose a rate by; the run is
            named.
    """
    search = study.learning_rates
    if search is None:
        return []
    runs = [
        grid.build(
            study,
            f"learning_rates/{size.name}.{method.name}.lr{rate:g}.seed{search.seed}",
            size,
            method,
            length,
            (study.budgets_of(size, method)[0],),
            search.seed,
            rate,
            is_trial=True,
        )
        for size, method, length in grid.lengths(study)
        if method.searches_rate
        for rate in search.values
    ]
    for run in runs:
        if not {source.task for source in run.config.data.validation} & {*run.tasks, "interleaved"}:
            raise UserError(
                f"run {run.name}: 'learning_rates' compares validation losses, and 'data.validation' has no "
                f"{' or '.join(run.tasks)} data"
            )
    return runs


def searches(study: Study, trials: Sequence[StudyRun]) -> list[Search]:
    """What the trials have found so far."""
    found: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
    for run in trials:
        tried = run.config.optimizer.lr, _loss(run, study)
        found.setdefault((run.size.name, run.method.name), []).append(tried)
    return [
        Search(
            *key,
            {rate: loss for rate, loss in tried if loss is not None},
            sum(loss is None for _, loss in tried),
        )
        for key, tried in found.items()
    ]


def rates(found: Sequence[Search]) -> dict[tuple[str, str], float]:
    """(size, method) -> the best rate, for searches that are complete."""
    return {(search.size, search.method): search.best for search in found if search.best is not None}


def waiting(runs: Sequence[StudyRun], found: Sequence[Search]) -> set[str]:
    """Names of the study's runs whose learning rate is not found yet."""
    incomplete = {(search.size, search.method) for search in found if search.best is None}
    return {run.name for run in runs if (run.size.name, run.method.name) in incomplete}


def write(study: Study, found: Sequence[Search]) -> None:
    """Write ``OUT/learning_rates.json``."""
    entries = [
        {
            "size": search.size,
            "method": search.method,
            "best": search.best,
            "at_edge": search.best is not None and search.is_at_edge,
            "mean_log_losses": {
                f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in search.losses.items()
            },
        }
        for search in found
    ]
    write_json(Path(study.output) / "learning_rates.json", {"seed": study.learning_rates.seed, "searches": entries})


def section(study: Study) -> list[str]:
    """The part of the report on the search; empty where there is none."""
    if study.learning_rates is None:
        return []
    all_searches = searches(study, trials(study))
    lines = [
        {"size": search.size, "method": search.method}
        | {f"lr {rate:g}": _shown(search, rate) for rate in study.learning_rates.values}
        for search in all_searches
    ]
    edges = ", ".join(f"{s.method} ({s.size}, {s.best:g})" for s in all_searches if s.best is not None and s.is_at_edge)
    text = (
        f"Each method was trained once with each rate, on seed {study.learning_rates.seed}, which no run has. The "
        "table has the mean log of the validation losses of its tasks; the lowest, in bold, is the rate of its runs."
    )
    if edges:
        text += f" At an end of the list, so that a rate beyond it might be better: {edges}."
    if diverged := ", ".join(f"{s.method} ({s.size})" for s in all_searches if s.has_diverged):
        text += f" Training diverged with every rate, so that there are no runs: {diverged}."
    return ["## Learning rates", text, tables.markdown(pd.DataFrame(lines))]


def _loss(run: StudyRun, study: Study) -> float | None:
    """None for a trial that has not ended."""
    if state.has_diverged(run):
        return math.inf
    result = state.result(run, steps.fingerprint(run, study.evaluation))
    return _mean_log(result["losses"]) if result else None


def _mean_log(losses: dict[str, float]) -> float:
    """Infinite where training diverged."""
    logs = [math.log(loss) for loss in losses.values()]
    return sum(logs) / len(logs) if all(map(math.isfinite, logs)) else math.inf


def _shown(search: Search, rate: float) -> str:
    if rate not in search.losses:
        return "-"
    if not math.isfinite(search.losses[rate]):
        return "diverged"
    return f"**{search.losses[rate]:.4f}**" if rate == search.best else f"{search.losses[rate]:.4f}"
