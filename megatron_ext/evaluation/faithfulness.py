"""Do pictures of the picture world show what was asked for? The share of facts that are right, beside a control.

A picture of anything is right about some of what any caption says, so a share alone proves little. The control is the
same pictures checked against prompts of *other* pictures; only what is above it is owed to the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.picture_world.check import KINDS, compare
from megatron_ext.picture_world.detection import Seen
from megatron_ext.picture_world.facts import Facts

ALL, WHOLE, NAMED = "all facts", "whole pictures", "seen objects that are named"
ROWS = (ALL, WHOLE, *KINDS, NAMED)
SHUFFLES = 8
"""Other prompts that each picture is checked against."""
RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True)
class Aligned:
    """How pictures agree with their prompts and with other pictures' prompts; shares in percent.

    Attributes:
        right: row of :data:`ROWS` -> share that is right; rows without any fact are left out.
        facts: the same, number of facts.
        shuffled: the same shares with other prompts; empty where there is only one picture.
        interval: 95 % interval of the difference, right - shuffled.
    """

    right: dict[str, float]
    facts: dict[str, int]
    shuffled: dict[str, float]
    interval: dict[str, list[float]]


def align(seen: Sequence[Seen | None], facts: Sequence[Facts], control: bool = True) -> Aligned:
    """Hold pictures against their prompts, and against others' as a control.

    A picture that is missing (None) shows nothing, so that none of its facts is right. The control's prompts are
    :func:`others`; the interval is that of a bootstrap over pictures, each with its own and the other prompts.
    """
    own, other = counted(seen, facts, control)
    there = own[:, :, 1].sum(0) > 0
    names = [row for row, said in zip(ROWS, there) if said]
    own = own[:, there]
    right, said = shares(own.sum(0)), own[:, :, 1].sum(0)
    if other is None:
        return Aligned(_named(names, right), _named(names, said.astype(int)), {}, {})
    other = other[:, there]
    return Aligned(
        _named(names, right),
        _named(names, said.astype(int)),
        _named(names, shares(other.sum(0))),
        _named(names, _interval(own, other)),
    )


def counted(
    seen: Sequence[Seen | None], facts: Sequence[Facts], control: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """What is right and what was said, [pictures, rows of :data:`ROWS`, 2]: of pictures' own prompts, and the mean of
    that over others' prompts, which is None without a control."""
    own = _counts(seen, facts)
    orders = others(len(facts)) if control else []
    if not len(orders):
        return own, None
    return own, np.mean([_counts(seen, [facts[i] for i in order]) for order in orders], axis=0)


def _named(names: Sequence[str], values: np.ndarray) -> dict:
    return dict(zip(names, values.tolist()))


def others(count: int) -> np.ndarray:
    """For each of ``count`` pictures the numbers of other prompts, [shuffles, count]: fixed, none is a picture's own,
    and none comes to it twice."""
    order = np.random.default_rng(SEED).permutation(count)
    made = np.empty((min(SHUFFLES, max(count - 1, 0)), count), dtype=int)
    for shift, row in enumerate(made, start=1):
        row[order] = np.roll(order, -shift)
    return made


def _counts(seen: Sequence[Seen | None], facts: Sequence[Facts]) -> np.ndarray:
    """What is right and what was said, [pictures, rows, 2]."""
    return np.array([_of_one(*pair) for pair in zip(seen, facts)], dtype=float)


def _of_one(seen: Seen | None, facts: Facts) -> list[tuple[int, int]]:
    verdict = compare(seen or Seen("", ()), facts)
    kinds = [verdict.facts[kind] for kind in KINDS]
    every = (sum(right for right, _ in kinds), sum(said for _, said in kinds))
    objects = len(seen.objects) if seen else 0
    return [every, (int(verdict.all_right), 1), *kinds, (objects - verdict.extra, objects)]


def shares(totals: np.ndarray) -> np.ndarray:
    """Percent of [rows, 2] right and said; nan of nothing said."""
    with np.errstate(invalid="ignore"):
        return 100 * totals[:, 0] / totals[:, 1]


def _interval(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """95 % interval [rows, 2] of the difference between the shares, by resampling pictures."""
    random, count = np.random.default_rng(SEED), len(own)
    differences = []
    for _ in range(RESAMPLES):
        weights = np.bincount(random.integers(count, size=count), minlength=count)
        differences.append(shares(np.tensordot(weights, own, 1)) - shares(np.tensordot(weights, other, 1)))
    # What hardly any caption speaks of may not be in a resample at all.
    return np.nanpercentile(differences, [2.5, 97.5], axis=0).T
