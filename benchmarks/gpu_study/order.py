"""The order of the runs of a study that may be cut short."""

from collections.abc import Sequence

from megatron_ext.study.grid import StudyRun
from megatron_ext.study.study_file import Study


def by_share_of_seeds(study: Study, runs: Sequence[StudyRun]) -> list[StudyRun]:
    """The runs seed by seed, each seed with all methods, because comparisons are within seeds; every size is as far
    through its seeds as the others."""

    def share(run: StudyRun) -> float:
        seeds = study.seeds_of(run.size)
        return (seeds.index(run.seed) + 1) / len(seeds)

    return sorted(runs, key=share)
