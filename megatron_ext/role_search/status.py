"""The progress of a search."""

from megatron_ext.analysis import tables
from megatron_ext.role_search.settings import RoleSearch
from megatron_ext.role_search.stages import Search
from megatron_ext.study import status


def text(settings: RoleSearch) -> str:
    """A table of runs for each stage that can be told so far: later ones depend on the results of earlier ones."""
    search, parts = Search.of(settings, read_only=True), []
    for trainings in search.stages():
        table, counts = status.table(trainings.study, trainings.runs)
        parts.append(f"{trainings.name}: {counts}\n\n{tables.markdown(table)}")
        if trainings.unfinished():
            return "\n\n".join(parts)
    left = len(search.missing())
    return "\n\n".join([*parts, f"{left} tables are not measured yet" if left else "every run is finished"])
