"""The progress of the runs of a study."""

from collections import Counter
from collections.abc import Collection, Sequence

import pandas as pd

from megatron_ext.study import state, steps
from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Study


def table(study: Study, runs: Sequence[StudyRun], waiting_for_rate: Collection[str] = ()) -> tuple[pd.DataFrame, str]:
    """A table with a row per run, and a line with the number of runs in each state.

    Args:
        waiting_for_rate: names of runs whose learning rate is not found yet.
    """
    states = [state.of(run, steps.fingerprint(run, study.evaluation)) for run in runs]
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(s.kind for s in states).items())
    notes = ["for its learning rate" if run.name in waiting_for_rate else s.note for run, s in zip(runs, states)]
    rows = [
        [run.name, s.kind, str(s.iteration), str(run.iterations), note] for run, s, note in zip(runs, states, notes)
    ]
    return pd.DataFrame(rows, columns=["run", "state", "iteration", "of", "note"]), counts


def unfinished(study: Study, runs: Sequence[StudyRun]) -> list[StudyRun]:
    """The runs with steps left to do."""
    return [
        run
        for run in runs
        if not state.result(run, steps.fingerprint(run, study.evaluation)) and not state.has_diverged(run)
    ]


def failed(study: Study, runs: Sequence[StudyRun]) -> list[str]:
    """The names of the runs that failed or were refused."""
    states = {run.name: state.of(run, steps.fingerprint(run, study.evaluation)) for run in runs}
    return [name for name, s in states.items() if s.kind in ("failed", "changed")]
