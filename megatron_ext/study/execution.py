"""All runs of a study, and their execution in order: trials of learning rates, then the runs that use these."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ext.study import grid, learning_rates, scheduler, state
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Study


@dataclass(frozen=True)
class Plan:
    """What a study trains.

    Attributes:
        trials: of learning rates.
        runs: with the learning rates found so far.
        waiting: names of the runs whose rate is not found yet.
        without_rate: those of them that have none, because training diverged with every rate.
    """

    trials: list[StudyRun]
    runs: list[StudyRun]
    waiting: set[str]
    without_rate: set[str]

    @property
    def all(self) -> list[StudyRun]:
        """The trials, then the runs."""
        return [*self.trials, *self.runs]

    def selected(self, names: Sequence[str] | None) -> list[StudyRun]:
        """The trials and runs with the given names; all for None.

        Raises:
            UserError: none has one of the names.
        """
        return grid.select(self.all, names)

    def needed(self, names: Sequence[str] | None) -> list[StudyRun]:
        """:meth:`selected`, and the trials that these need."""
        selected = self.selected(names)
        methods = {(run.size.name, run.method.name) for run in selected if not run.is_trial}
        chosen = {run.name for run in selected}
        return [
            run
            for run in self.all
            if run.name in chosen or (run.is_trial and (run.size.name, run.method.name) in methods)
        ]


def plan(study: Study) -> Plan:
    """All trials and runs of a study.

    Raises:
        UserError: the configuration of a run is refused; the run is named.
    """
    trials = learning_rates.trials(study)
    searches = learning_rates.searches(study, trials)
    runs = grid.runs(study, learning_rates.rates(searches))
    diverged = [search for search in searches if search.has_diverged]
    return Plan(trials, runs, learning_rates.waiting(runs, searches), learning_rates.waiting(runs, diverged))


def execute(
    study: Study,
    names: Sequence[str] | None = None,
    jobs: int = 1,
    gpus: Sequence[str] = (),
    start: Callable | None = None,
) -> Plan:
    """Do the remaining steps of a study, as :func:`~.scheduler.execute` does; failed runs do not stop the others.

    Args:
        names: only these runs, and the trials that they need; None: all.
        jobs, gpus, start: as for :func:`~.scheduler.execute`.

    Returns:
        The plan with the learning rates found; runs whose trials failed are waiting still.

    Raises:
        UserError: a signal arrived, a run needs more GPUs than there are, or there is no run of a name.
    """
    planned = plan(study)
    trials = [run for run in planned.needed(names) if run.is_trial and not state.has_diverged(run)]
    if trials:
        scheduler.execute(trials, study.evaluation, jobs, gpus, start)
        planned = plan(study)
        learning_rates.write(study, learning_rates.searches(study, planned.trials))
    ready = [run for run in planned.selected(names) if not run.is_trial and run.name not in planned.waiting]
    if ready:
        scheduler.execute(ready, study.evaluation, jobs, gpus, start)
    return planned
