"""The file of a role search, checked as strictly as configurations."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext import config_file
from megatron_ext.config import RoleChoice
from megatron_ext.errors import UserError, check_at_least_one


@dataclass
class DrawnModel:
    """The model that tables are measured with: its documents draw random tables."""

    tokens: int = 5_000_000
    """Tokens of its training."""
    tables: int = 64
    """Number of random tables that documents draw from (``plan.drawn_tables.count``)."""
    own: float = 0.125
    """Probability that a document takes the table of ``plan``, without changes (``plan.drawn_tables.own``)."""
    seed: int = 1
    """Random tables are functions of it: those drawn, and those of the other arm."""
    rows: int = 64
    """Packed rows of the validation data on which losses are measured."""


@dataclass
class Rung:
    """A round of successive halving: the model whose documents drew tables is trained further under each of the best
    tables of the round before."""

    tables: int
    """Tables of each arm, those searched and random ones."""
    tokens: int
    """Tokens of each training."""


@dataclass
class FreshSeeds:
    """The comparison that is reported: the best table of each arm and the plan without changes, trained from the start
    on new seeds."""

    seeds: list[int] = field(default_factory=lambda: [11, 12, 13, 14])
    """Values of training.seed and data.seed, none of them that of the search."""
    tokens: int = 2_000_000
    """Tokens of each training."""


@dataclass
class RoleSearch:
    """The whole search."""

    name: str
    output: str
    """Folder of the runs, ``search.json``, ``report.md`` and ``best.yaml``."""
    base: list[str]
    """Configuration files, as after ``pretrain_unified.py --config``."""
    settings: dict = field(default_factory=dict)
    """Merged into the base configuration."""
    plan: dict = field(default_factory=lambda: {"preset": "dense_lossless"})
    """The plan that tables change, as in a configuration."""
    choices: list[RoleChoice] = field(default_factory=list)
    """Roles that tables may give; empty: every legal one (``plan.drawn_tables.choices``)."""
    cost: float = 0.6
    """The most FLOPs of a table, relative to lossless dense on the same rows of the training data."""
    candidates: int = 200
    """Tables with small sums of changes of loss that are measured as wholes; the best of them are trained."""
    distance: int = 4
    """Entries in which two candidates, and two of those trained, differ at least, as far as there are enough."""
    seed: int = 1
    """Values of training.seed and data.seed of every run before the report."""
    drawn: DrawnModel = field(default_factory=DrawnModel)
    rungs: list[Rung] = field(default_factory=lambda: [Rung(24, 200_000), Rung(8, 600_000), Rung(3, 2_000_000)])
    report: FreshSeeds = field(default_factory=FreshSeeds)


def read(*files: str | Path) -> RoleSearch:
    """The search in a file, or in several that are laid over one another, as configurations are.

    Raises:
        UserError: a file cannot be read, or an entry is wrong or missing.
    """
    try:
        search = config_file.from_trees(RoleSearch, [config_file.read_yaml(file) for file in files])
        _check(search)
    except UserError as error:
        raise UserError(f"{' + '.join(map(str, files))}: {str(error).removeprefix('config: ')}") from None
    return search


def _check(search: RoleSearch) -> None:
    if not search.base:
        raise UserError("'base' is empty; name a configuration")
    if not 0 < search.cost <= 1:
        raise UserError(f"'cost' is {search.cost:g}, must lie above 0 and up to 1, the FLOPs of lossless dense")
    check_at_least_one("drawn", search.drawn, "tokens", "tables", "rows")
    if search.distance < 1:
        raise UserError(f"'distance' is {search.distance}, must be at least 1")
    if not search.rungs:
        raise UserError("'rungs' is empty; give at least one")
    if search.candidates < search.rungs[0].tables:
        raise UserError(
            f"'candidates' is {search.candidates}, must be at least 'rungs[0].tables' ({search.rungs[0].tables})"
        )
    for number, rung in enumerate(search.rungs):
        check_at_least_one(f"rungs[{number}]", rung, "tables", "tokens")
        if number and rung.tables >= search.rungs[number - 1].tables:
            raise UserError(
                f"'rungs[{number}].tables' is {rung.tables}, must be less than those of the rung before "
                f"({search.rungs[number - 1].tables})"
            )
    check_at_least_one("report", search.report, "tokens")
    seeds = search.report.seeds
    if not seeds or len(set(seeds)) < len(seeds) or search.seed in seeds:
        raise UserError(f"'report.seeds' is {seeds}; give at least one, each once, and not 'seed' ({search.seed})")
