"""The multiple-choice knapsack problem, solved exactly: the best choices of one option from each group within a budget.

Dynamic programming over the groups. A partial choice is dropped only if as many as are wanted cost no more and are no
worse: whatever completes it completes them, so it cannot be among the best.
"""

import heapq
from collections.abc import Sequence

import numpy as np

Option = tuple[int, float]
"""Cost and value; less is better."""


def best(groups: Sequence[Sequence[Option]], budget: int, count: int) -> list[list[int]]:
    """The ``count`` choices whose values have the smallest sums, of those whose costs sum to at most ``budget``.

    Returns:
        For each choice, best first, the index of the option in each group; fewer than ``count`` if there are no more.
    """
    least = [min(cost for cost, _ in group) for group in groups]
    costs, values = np.zeros(1, np.int64), np.zeros(1)
    picks = np.zeros((1, 0), np.int32)
    for number, group in enumerate(groups):
        of_options = np.array([cost for cost, _ in group], np.int64), np.array([value for _, value in group])
        costs, values = ((sums[:, None] + own).ravel() for sums, own in zip((costs, values), of_options))
        picked = np.tile(np.arange(len(group), dtype=np.int32), len(picks))
        picks = np.column_stack([picks.repeat(len(group), axis=0), picked])
        fits = np.flatnonzero(costs + sum(least[number + 1 :]) <= budget)
        kept = fits[_not_dominated(costs[fits], values[fits], count)]
        costs, values, picks = costs[kept], values[kept], picks[kept]
    return picks[np.lexsort((costs, values))[:count]].tolist()


def _not_dominated(costs: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the entries for which fewer than ``count`` others cost no more and have no larger value."""
    smallest: list[float] = []  # a heap of the negative values of the best so far
    kept = []
    for index in np.lexsort((values, costs)).tolist():
        value = -float(values[index])
        if len(smallest) < count:
            heapq.heappush(smallest, value)
        elif value > smallest[0]:
            heapq.heapreplace(smallest, value)
        else:
            continue
        kept.append(index)
    return np.array(kept, dtype=np.int64)
