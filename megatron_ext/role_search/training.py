"""The trainings of a search, as studies: the model whose documents draw tables, the rungs, the report's fresh seeds.

A study gives each run its folder, resumes it, and refuses it if its configuration has changed.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_ext.analysis.synergy import PRIMARY
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.role_search.settings import RoleSearch
from megatron_ext.role_search.space import Space
from megatron_ext.routing.drawn_tables import Table
from megatron_ext.study import forked, grid, scheduler, state, status, steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Method, Size, Study

UNCHANGED = "unchanged"
"""The name of the plan without changes."""


@dataclass(frozen=True)
class Trainings:
    """The runs of one stage.

    Attributes:
        name: of the stage, and its folder in the search's.
    """

    name: str
    study: Study
    runs: list[StudyRun]

    @classmethod
    def of(
        cls,
        search: RoleSearch,
        space: Space,
        name: str,
        plans: Mapping[str, dict],
        tokens: int,
        seeds: Sequence[int],
        start: Path | None = None,
    ) -> "Trainings":
        """A run for each plan and seed.

        Args:
            plans: name -> the section ``plan`` of a configuration.
            tokens: of each run, rounded to whole steps.
            start: the run whose weights they start from; None: noise.

        Raises:
            UserError: the configuration of a run is refused; the run is named.
        """
        settings = length(space.config, tokens) | ({"checkpoint": {"load": str(start)}} if start else {})
        study = Study(
            name=f"{search.name}, {name}",
            output=str(Path(search.output) / name),
            base=search.base,
            settings=search.settings,
            sizes=[Size(name, settings)],
            methods=[Method(method, "unified", "none", {"plan": plan}) for method, plan in plans.items()],
            seeds=list(seeds),
        )
        return cls(name, study, grid.runs(study))

    def execute(self, jobs: int, gpus: Sequence[str]) -> None:
        """Train what is left, ``jobs`` runs at once.

        Raises:
            UserError: a run failed, or a signal arrived.
        """
        if self.unfinished():
            scheduler.execute(self.runs, self.study.evaluation, jobs, gpus, forked.start_program)
        if left := status.failed(self.study, self.runs):
            raise UserError(f"{self.name}: {len(left)} of {len(self.runs)} runs failed: {', '.join(left)}")

    def unfinished(self) -> list[StudyRun]:
        """The runs that are left to do."""
        return status.unfinished(self.study, self.runs)

    def results(self) -> dict[str, dict[int, dict]]:
        """The result of every run, by plan and seed; see :mod:`megatron_ext.study.outcome`."""
        results: dict[str, dict[int, dict]] = {}
        for run in self.runs:
            result = state.result(run, steps.fingerprint(run, self.study.evaluation))
            results.setdefault(run.method.name, {})[run.seed] = result
        return results

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs of the training of each plan."""
        return {name: sum(r["flops"] for r in of_seeds.values()) for name, of_seeds in self.results().items()}


def drawn_model(search: RoleSearch, space: Space) -> Trainings:
    """The training of the model that tables are measured with."""
    drawn = search.drawn
    tables = {"count": drawn.tables, "own": drawn.own, "seed": drawn.seed}
    tables["choices"] = [dataclasses.asdict(choice) for choice in search.choices]
    plans = {"drawn": search.plan | {"drawn_tables": tables}}
    return Trainings.of(search, space, "drawn", plans, drawn.tokens, [search.seed])


def of_tables(
    search: RoleSearch,
    space: Space,
    name: str,
    tables: Mapping[str, Table],
    tokens: int,
    seeds: Sequence[int],
    start: Path | None = None,
) -> Trainings:
    """The trainings of tables by their names, and of the plan without changes; see :meth:`Trainings.of`."""
    plans = {method: plan_section(search, space, table) for method, table in ({UNCHANGED: space.own} | tables).items()}
    return Trainings.of(search, space, name, plans, tokens, seeds, start)


def plan_section(search: RoleSearch, space: Space, table: Table) -> dict:
    """The section ``plan`` of a configuration that has a table."""
    entries = [*search.plan.get("table", []), *space.entries(table)]
    return search.plan | ({"table": entries} if entries else {})


def scores(trainings: Trainings) -> dict[str, float]:
    """The mean score over the seeds of each table; less is better."""
    results = trainings.results()
    base = results.pop(UNCHANGED)
    return {name: fmean(score(of[seed], base[seed]) for seed in of) for name, of in results.items()}


def score(result: Mapping, base: Mapping) -> float:
    """The larger of both tasks' ln(validation loss / that of ``base``); infinite for a run that diverged."""
    losses = [(result["losses"].get(loss, math.inf), base["losses"].get(loss, math.nan)) for loss in PRIMARY]
    ratios = [own / other for own, other in losses]
    return math.log(max(ratios)) if all(map(math.isfinite, ratios)) else math.inf


def best(trainings: Trainings, names: Iterable[str], count: int) -> list[str]:
    """The ``count`` tables of the lowest scores, best first."""
    return sorted(names, key=scores(trainings).__getitem__)[:count]


def length(config: Config, tokens: int) -> dict:
    """The settings of a training of so many tokens: its steps, with warm-up and decay in the configuration's share of
    them."""
    of_step = config.training.global_batch_size * config.data.sequence_length
    iterations = max(2, round(tokens / of_step))
    share = iterations / config.training.iterations
    optimizer = {
        "warmup_iterations": min(config.optimizer.warmup_iterations, iterations // 10),
        "wsd_decay_iterations": max(1, round(config.optimizer.wsd_decay_iterations * share)),
    }
    return {"training": {"iterations": iterations, "validation_interval": iterations}, "optimizer": optimizer}
