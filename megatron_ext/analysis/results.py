"""Results of trained models in one JSON form: written by a study, copied from the paper, or typed in by hand.

::

    {"source": "where the figures come from",
     "metrics": {"GQA": {"task": "understanding"},
                 "MJHQ-FID": {"task": "generation", "higher_is_better": false}},
     "rows": [{"method": "dense", "task": "unified", "partner_group": "dense", "seed": 1, "size": "small",
               "flops_ratio": 1.0, "metrics": {"GQA": 56.0, "MJHQ-FID": 15.78}}, ...]}

A row is one trained model, and ``task`` is the task or tasks it was trained on. The single-task reference runs of a
unified row are the single-task rows that share a ``partner_group`` (a name, or several) with it; a unified row without
one, [], is compared with nothing. Rows are compared within the same ``size``, ``budget`` and ``evaluated_as``, seed by
seed.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ext import config_file
from megatron_ext.errors import UserError
from megatron_ext.files import read_json

PUBLISHED = Path(__file__).with_name("published.json")
"""The tables of arXiv 2606.01503. The generation reference of its unified methods is HMGen with 3 shallow layers: their
FLOPs show that they have 3 too."""


@dataclass
class Metric:
    """How to read a figure."""

    task: Literal["understanding", "generation"]
    higher_is_better: bool = True
    in_average: bool = True
    """Whether it is a result of its own, and counts in the average over the metrics of its task unless in points."""
    scale: Literal["log", "points"] = "log"
    """Models are compared by log ratios or, where figures may be 0 or less, by differences in points."""

    def score(self, figure: float | None) -> float | None:
        """A figure on the scale of comparisons, on which higher is better: log points (100 ln) or points.

        None for a missing figure, for one that is not finite, and for one without a logarithm.
        """
        if figure is None or not math.isfinite(figure) or (self.scale == "log" and figure <= 0):
            return None
        score = 100 * math.log(figure) if self.scale == "log" else float(figure)
        return score if self.higher_is_better else -score


@dataclass
class Row:
    """The results of one trained model."""

    method: str
    task: Literal["understanding", "generation", "unified"]
    partner_group: str | list[str]
    metrics: dict[str, float | None]
    flops_ratio: float | None = None
    """Training FLOPs relative to dense on the same rows; in a study, to lossless dense."""
    seed: int | None = None
    size: str | None = None
    parameters: int | None = None
    """Parameters of the dense model of this size, the same for all methods of the size."""
    budget: str | None = None
    """The quantity held equal over the methods: tokens, steps, total or flops."""
    evaluated_as: str | None = None
    """The roles in evaluation, where they differ from those of training."""
    iterations: int | None = None
    tokens: int | None = None
    flops: float | None = None
    """Total training FLOPs."""
    run: str | None = None
    """The run's folder, relative to the study's."""

    @property
    def partner_groups(self) -> list[str]:
        return [self.partner_group] if isinstance(self.partner_group, str) else self.partner_group

    @property
    def setting(self) -> tuple[str | None, str | None, str | None]:
        """Size, budget and roles in evaluation; rows of different settings are never compared."""
        return self.size, self.budget, self.evaluated_as


@dataclass
class Results:
    """Rows, and how to read their metrics."""

    source: str
    metrics: dict[str, Metric] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def read(file: str | Path) -> Results:
    """The results in a file.

    Raises:
        UserError: the file cannot be read, or an entry is not of this form.
    """
    tree = read_json(file)
    try:
        if not isinstance(tree, dict):
            raise UserError("is not an object with source, metrics and rows")
        loaded = config_file.from_tree(Results, tree)
        loaded.metrics = {
            name: config_file.from_tree(Metric, _mapping(value, f"metrics.{name}"), f"metrics.{name}")
            for name, value in loaded.metrics.items()
        }
        for number, row in enumerate(loaded.rows):
            for name, value in row.metrics.items():
                if name not in loaded.metrics:
                    raise UserError(f"rows[{number}] has the metric {name!r}, which is not among 'metrics'")
                if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                    raise UserError(f"rows[{number}].metrics.{name} is {value!r}, must be a number or null")
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix('config: ')}") from None
    return loaded


def read_all(files: list[Path]) -> Results:
    """The results of several files as one.

    Raises:
        UserError: as for :func:`read`, or two files define a metric differently.
    """
    joined = Results("")
    sources = {}
    for file in files:
        loaded = read(file)
        sources[loaded.source] = None
        for name, metric in loaded.metrics.items():
            if joined.metrics.setdefault(name, metric) != metric:
                raise UserError(f"{file}: metric {name!r} has another task or direction in an earlier file")
        joined.rows += loaded.rows
    joined.source = "; ".join(sources)
    return joined


def published() -> Results:
    """The paper's tables."""
    return read(PUBLISHED)


def _mapping(value, path: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"'{path}' must be a mapping, got {value!r}")
    return value
