"""A search for the role table that keeps both tasks at a given cost, from its file to its report.

::

    OUT/drawn/             one model, whose documents draw random tables
    OUT/costs.json         FLOPs of every combination of roles in a layer
    OUT/measured.json      losses of tables with that model
    OUT/rung1/, rung2/ ... its further training under the best tables and random ones, fewer and longer each time
    OUT/fresh/             trainings of the best of each arm and of the plan without changes from the start, on seeds of
                           their own
    OUT/search.json        every figure
    OUT/report.md          the same in words and tables
    OUT/best.yaml          the best table, as a method (also best_random.yaml)
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_ext.files import write_json, write_text
from megatron_ext.role_search import figures, report, training
from megatron_ext.role_search.settings import RoleSearch
from megatron_ext.role_search.stages import ARMS, Search

FILES = {"searched": "best", "random": "best_random"}


def run(settings: RoleSearch, jobs: int = 1, gpus: Sequence[str] = ()) -> dict:
    """Do what is left of a search, and write its figures, its report and the best tables.

    Returns:
        What ``OUT/search.json`` has.

    Raises:
        UserError: a run failed, data cannot be read, or a signal arrived; the same call resumes the search.
    """
    search = Search.of(settings)
    for trainings in search.stages():
        trainings.execute(jobs, gpus)
    numbers, folder = figures.collect(search), Path(settings.output)
    for arm in ARMS:
        write_text(folder / f"{FILES[arm]}.yaml", method_file(search, arm, numbers["best"][arm]))
    write_json(folder / "search.json", numbers)
    write_text(folder / "report.md", report.markdown(numbers))
    return numbers


def method_file(search: Search, arm: str, name: str) -> str:
    """A table of an arm as a method file, which pretrain_unified.py and tools/speedrun.py accept."""
    ratio = search.costs.ratio(search.tables[name])
    plan = training.plan_section(search.settings, search.space, search.tables[name])
    lines = [f"  {key}: {_flow(value)}" for key, value in plan.items() if key != "table"]
    if entries := plan.get("table"):
        lines += ["  table:", *(f"    - {_flow(entry)}" for entry in entries)]
    origin = f"The best of {search.settings.rungs[0].tables} {arm} tables of the role search {search.settings.name}"
    return "\n".join([f"# {origin}: {ratio:.3f} of the FLOPs of lossless dense.", "plan:", *lines]) + "\n"


def _flow(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("...\n").strip()
