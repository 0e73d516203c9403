"""Intervals and tests over seeds: against scipy's own tests, brute force, published values."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from megatron_ext.analysis import statistics

VALUES = [0.031, -0.012, 0.054, 0.022, 0.047, 0.008]


def test_intervals_and_tests_are_those_of_scipy():
    estimate = statistics.t_interval(VALUES, 0.9)
    expected = stats.ttest_1samp(VALUES, 0)
    assert (estimate.low, estimate.high) == pytest.approx(expected.confidence_interval(0.9))
    assert (estimate.mean, estimate.p, estimate.n) == pytest.approx((np.mean(VALUES), expected.pvalue, 6))
    greater = stats.ttest_1samp(VALUES, 0.01, alternative="greater")
    assert statistics.one_sided(VALUES, 0.01) == pytest.approx(greater.pvalue)
    low = stats.ttest_1samp(VALUES, 0, alternative="greater").confidence_interval(0.9).low
    assert statistics.lower_bound(VALUES) == pytest.approx(low)
    sides = [stats.ttest_1samp(VALUES, x, alternative=a).pvalue for x, a in ((-0.06, "greater"), (0.06, "less"))]
    tested = statistics.equivalence(VALUES, margin=0.06)
    assert tested.p == pytest.approx(max(sides)) and tested.holds and tested.estimate == estimate
    assert not statistics.equivalence(VALUES).holds


def test_equivalence_is_that_the_interval_lies_within_the_margins():
    random = np.random.default_rng(0)
    for values in random.normal(0.01, 0.012, (200, 4)):
        tested = statistics.equivalence(values)
        within = max(-tested.estimate.low, tested.estimate.high) <= statistics.MARGIN
        assert tested.holds == within


def test_sign_flip_counts_all_changes_of_signs():
    for values in (VALUES, [1, 1, -2, 0], [3.0], np.random.default_rng(1).normal(0.5, 1, 9)):
        sums = [abs(np.dot(signs, values)) for signs in itertools.product((1, -1), repeat=len(values))]
        assert statistics.sign_flip(values) == np.mean(np.array(sums) >= abs(np.sum(values)) - 1e-12)
    assert statistics.sign_flip([0.2, 0.1, 0.3, 0.1, 0.2, 0.1]) == 2 / 64


def test_holm_gives_published_values():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.2, None, 0.3]) == pytest.approx([0.6, None, 0.6]) and statistics.holm([]) == []


def test_one_seed_has_no_interval_and_equal_seeds_no_doubt():
    alone = statistics.t_interval([0.2])
    assert (alone.mean, alone.low, alone.high, alone.p) == (0.2, None, None, None)
    assert not statistics.equivalence([0.0]).holds and statistics.one_sided([0.2]) is None
    with pytest.raises(ValueError, match="two values"):
        statistics.lower_bound([0.2])
    equal = statistics.t_interval([0.25, 0.25])
    assert (equal.low, equal.high, equal.p) == (0.25, 0.25, 0.0)
    assert statistics.t_interval([0.0, 0.0]).p == 1 and statistics.equivalence([0.0, 0.0]).p == 0
    assert math.isclose(statistics.MARGIN, 0.0296, abs_tol=1e-4)
