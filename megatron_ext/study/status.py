"""How far the runs of a study are."""

from collections import Counter
from collections.abc import Sequence

from megatron_ext.analysis.tables import Table
from megatron_ext.study import state, steps
from megatron_ext.study.grid import Run
from megatron_ext.study.study_file import Study


def table(study: Study, runs: Sequence[Run]) -> Table:
    """A row per run."""
    states = [state.of(run, steps.fingerprint(run, study.evaluation)) for run in runs]
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(s.kind for s in states).items())
    rows = [[run.name, s.kind, str(s.iteration), str(run.iterations), s.note] for run, s in zip(runs, states)]
    return Table(counts, ["run", "state", "iteration", "of", "note"], rows)


def unfinished(study: Study, runs: Sequence[Run]) -> list[Run]:
    """The runs that have something left to do."""
    return [run for run in runs if not state.result(run, steps.fingerprint(run, study.evaluation))]


def failed(study: Study, runs: Sequence[Run]) -> list[str]:
    """The names of runs that failed or were refused."""
    states = {run.name: state.of(run, steps.fingerprint(run, study.evaluation)) for run in runs}
    return [name for name, s in states.items() if s.kind in ("failed", "changed")]
