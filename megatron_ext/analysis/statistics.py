"""Intervals and tests over seeds.

The unit is the seed: ``values`` has one number per seed, in which everything is paired already (a log ratio of two
models of the seed, a difference of two log ratios). All tests but :func:`sign_flip` are Student's t tests, which assume
that the values are independent and about normal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95
"""Level of intervals; a test is at 1 - LEVEL."""
MARGIN = math.log(1.03)
"""Log ratios within this margin of 0 count as no difference: 3 %."""
_MOST_SIGNS = 40
"""Most values of :func:`sign_flip`, whose work doubles with two more."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        low, high: the interval at ``level``; None for one seed, which says nothing about the variation over seeds.
        n: the number of seeds.
        p: of the two-sided t test of a mean of 0; None for one seed.
    """

    mean: float
    low: float | None
    high: float | None
    level: float
    n: int
    p: float | None


@dataclass(frozen=True)
class Equivalence:
    """The result of two one-sided t tests.

    Attributes:
        estimate: with the interval whose inclusion in the margins is the test: 90 % for a test at 5 %.
        p: the larger of both tests; None for one seed.
        holds: whether the mean is shown to be within the margins.
    """

    estimate: Estimate
    p: float | None
    holds: bool


def t_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """The mean, its central t-interval, and the t test of a mean of 0.

    Raises:
        ValueError: there is no value.
    """
    mean, error, n = _mean_and_error(values)
    if n == 1:
        return Estimate(mean, None, None, level, n, None)
    half_width = float(stdtrit(n - 1, (1 + level) / 2)) * error
    p = 2 * min(_below(mean, error, n, 0), _below(-mean, error, n, 0))
    return Estimate(mean, mean - half_width, mean + half_width, level, n, min(1.0, p))


def one_sided(values: Sequence[float], bound: float = 0) -> float | None:
    """p of the t test whose alternative is a mean *above* ``bound``; None for one seed."""
    mean, error, n = _mean_and_error(values)
    return None if n == 1 else _below(-mean, error, n, -bound)


def lower_bound(values: Sequence[float], level: float = 0.9) -> float:
    """The one-sided lower bound of the mean at ``level``.

    Raises:
        ValueError: there are fewer than two values.
    """
    mean, error, n = _mean_and_error(values)
    if n < 2:
        raise ValueError("a bound needs two values")
    return mean - float(stdtrit(n - 1, level)) * error


def equivalence(values: Sequence[float], margin: float = MARGIN, level: float = 0.9) -> Equivalence:
    """Test whether the mean is within ``margin`` of 0: two one-sided t tests, each at (1 - level) / 2."""
    estimate = t_interval(values, level)
    if estimate.n == 1:
        return Equivalence(estimate, None, False)
    p = max(one_sided(values, -margin), one_sided([-value for value in values], -margin))
    return Equivalence(estimate, p, p <= (1 - level) / 2 + 1e-12)


def sign_flip(values: Sequence[float]) -> float:
    """Exact two-sided p of a mean of 0, from all 2^n changes of the values' signs; assumes symmetry alone.

    The smallest p of n seeds is 2^(1 - n): 0.03 for six.

    Raises:
        ValueError: there is no value, or more than 40.
    """
    values = np.asarray(values, float)
    if not 0 < len(values) <= _MOST_SIGNS:
        raise ValueError(f"{len(values)} values; must be 1 to {_MOST_SIGNS}")
    half, other = _signed_sums(values[: len(values) // 2]), np.sort(_signed_sums(values[len(values) // 2 :]))
    least = abs(values.sum()) - 1e-9 * np.abs(values).sum()  # equal sums count, whatever their rounding
    above = len(other) - np.searchsorted(other, least - half)
    # The sums below are as many, by symmetry; with a least of 0 or below, all count.
    return 1.0 if least <= 0 else float(2 * above.sum() / 2.0 ** len(values))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p values, in the order given. A missing one stays missing, but counts: its test was planned."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[place] = largest
    return adjusted


def _signed_sums(values: np.ndarray) -> np.ndarray:
    """The sums of ``values`` under all changes of signs, [2^n]."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _mean_and_error(values: Sequence[float]) -> tuple[float, float, int]:
    """The mean, its standard error (NaN for one value), and the number of values."""
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("no values")
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan, n


def _below(mean: float, error: float, n: int, bound: float) -> float:
    """p of the t test whose alternative is a mean below ``bound``."""
    if error == 0:  # equal values
        return 1.0 if mean >= bound else 0.0
    return float(stdtr(n - 1, (mean - bound) / error))
