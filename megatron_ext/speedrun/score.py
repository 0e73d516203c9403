"""The score of a submission: neither task can be sold for the other, and luck with one seed does not help."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.analysis.statistics import lower_bound
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Score:
    """A score and what it is made from.

    Attributes:
        understanding, generation: of each seed, relative to the mean of dense; at least 0.
        score: the one-sided lower bound of the mean of the smaller of both; at least 0.
    """

    understanding: list[float]
    generation: list[float]
    score: float


def score(figures: dict[str, Sequence[float]], dense: dict[str, Sequence[float]], level: float) -> Score:
    """The score of figures relative to those of dense, both task -> chance-corrected figure of each seed.

    Raises:
        UserError: dense does not exceed chance, so that nothing can be said relative to it.
    """
    relative = {}
    for task, values in figures.items():
        if (reference := float(np.mean(dense[task]))) <= 0:
            raise UserError(f"dense has {reference:.1f} % above chance in {task}: nothing can be relative to it")
        relative[task] = [max(0.0, value) / reference for value in values]
    smaller = [min(pair) for pair in zip(relative["understanding"], relative["generation"])]
    return Score(relative["understanding"], relative["generation"], max(0.0, lower_bound(smaller, level)))
