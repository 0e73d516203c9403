"""Results of trained models as one JSON form: what a study writes, what the paper printed, what one types in by hand.

::

    {"source": "where the figures come from",
     "metrics": {"GQA": {"task": "understanding"},
                 "MJHQ-FID": {"task": "generation", "higher_is_better": false}},
     "rows": [{"method": "dense", "task": "unified", "partner_group": "dense", "seed": 1, "size": "small",
               "flops_ratio": 1.0, "metrics": {"GQA": 56.0, "MJHQ-FID": 15.78}}, ...]}

A row is one trained model. ``task`` is what it was trained on. ``partner_group`` (a name, or several) says which rows
belong together: the single-task partners of a unified row are the rows of the same group that were trained on one task
only. Rows are compared within the same ``size``, ``budget`` and ``evaluated_as``; ``seed`` is averaged over.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ext import config_file
from megatron_ext.errors import UserError
from megatron_ext.files import read_json

PUBLISHED = Path(__file__).with_name("published.json")
"""The tables of arXiv 2606.01503. HMGen with 3 shallow layers is the generation partner of its unified methods: they
have 3 too, as their FLOPs say."""


@dataclass
class Metric:
    """How a figure is to be read."""

    task: Literal["understanding", "generation"]
    higher_is_better: bool = True
    in_average: bool = True
    """Counts in the average over the metrics of its task."""


@dataclass
class Row:
    """One trained model, evaluated."""

    method: str
    task: Literal["understanding", "generation", "unified"]
    partner_group: str | list[str]
    metrics: dict[str, float | None]
    flops_ratio: float | None = None
    """Training FLOPs relative to the dense model on the same rows."""
    seed: int | None = None
    size: str | None = None
    parameters: int | None = None
    """Of the dense model of this size, so that all methods of a size share it."""
    budget: str | None = None
    """What was held equal over the methods: tokens or flops."""
    evaluated_as: str | None = None
    """Under which roles the model was evaluated, where not those it was trained with."""
    iterations: int | None = None
    tokens: int | None = None
    flops: float | None = None
    """Training FLOPs in all."""
    run: str | None = None
    """The run's folder, relative to the study's."""

    @property
    def partner_groups(self) -> list[str]:
        return [self.partner_group] if isinstance(self.partner_group, str) else self.partner_group

    @property
    def setting(self) -> tuple[str | None, str | None, str | None]:
        """Size, budget and roles in evaluation: rows that differ here are never compared."""
        return self.size, self.budget, self.evaluated_as


@dataclass
class Results:
    """Rows, and how to read their figures."""

    source: str
    metrics: dict[str, Metric] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def read(file: str | Path) -> Results:
    """The results in a file.

    Raises:
        UserError: the file cannot be read or is not of this form; the entry at fault is named.
    """
    tree = read_json(file)
    try:
        if not isinstance(tree, dict):
            raise UserError("is not an object with source, metrics and rows")
        made = config_file.from_tree(Results, tree)
        made.metrics = {
            name: config_file.from_tree(Metric, _mapping(value, f"metrics.{name}"), f"metrics.{name}")
            for name, value in made.metrics.items()
        }
        for number, row in enumerate(made.rows):
            for name, value in row.metrics.items():
                if name not in made.metrics:
                    raise UserError(f"rows[{number}] has the metric {name!r}, which is not among 'metrics'")
                if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                    raise UserError(f"rows[{number}].metrics.{name} is {value!r}, must be a number or null")
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix('config: ')}") from None
    return made


def read_all(files: list[Path]) -> Results:
    """The results of several files as one.

    Raises:
        UserError: as for :func:`read`, or two files read a metric differently.
    """
    made = [read(file) for file in files]
    joined = Results("; ".join(dict.fromkeys(one.source for one in made)))
    for file, one in zip(files, made):
        for name, metric in one.metrics.items():
            if joined.metrics.setdefault(name, metric) != metric:
                raise UserError(f"{file}: metric {name!r} is of another task or direction than in an earlier file")
        joined.rows += one.rows
    return joined


def published() -> Results:
    """The paper's tables."""
    return read(PUBLISHED)


def _mapping(value, path: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"'{path}' must be a mapping, got {value!r}")
    return value
