"""How far generated pictures agree with their captions: the share of correct facts, beside a control.

Any picture agrees with some facts of any caption by chance, so a share alone proves little. The control checks the same
pictures against the prompts of *other* pictures; only the share above the control is due to the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.picture_world.check import KINDS, compare
from megatron_ext.picture_world.detected import DetectedScene
from megatron_ext.picture_world.facts import CaptionFacts

ALL, STRICT, WHOLE = "all facts", "all facts, and nothing else", "whole pictures"
NAMED = "seen objects that are named"
ROWS = (ALL, STRICT, WHOLE, *KINDS, NAMED)
UNNAMED = 3
"""Wrong facts in :data:`STRICT` for an object that the caption does not name: as many as one that it names has (object,
color, count). With fewer it would pay to draw two objects where one is in doubt."""
SHUFFLES = 8
"""Other prompts that each picture is checked against, at most."""
RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True)
class Faithfulness:
    """Agreement of pictures with their own prompts and with other pictures' prompts; shares in percent.

    Attributes:
        right: share of correct facts by row of :data:`ROWS`; rows without facts are left out.
        facts: number of facts by row.
        control: share of correct facts with other prompts, by row; empty for a single picture.
        interval: 95 % interval of the difference right - control, by row.
    """

    right: dict[str, float]
    facts: dict[str, int]
    control: dict[str, float]
    interval: dict[str, list[float]]


def measure(seen: Sequence[DetectedScene | None], facts: Sequence[CaptionFacts], control: bool = True) -> Faithfulness:
    """Check pictures against their own prompts and, as a control, against other prompts.

    A missing picture (None) shows nothing, so none of its facts is correct. :func:`control_order` assigns the other
    prompts. The interval is a bootstrap over pictures, each with its own and its other prompts.
    """
    own, other = count_facts(seen, facts, control)
    has_facts = own[:, :, 1].sum(0) > 0
    names = [row for row, present in zip(ROWS, has_facts) if present]
    own = own[:, has_facts]
    right, totals = shares(own.sum(0)), own[:, :, 1].sum(0)
    if other is None:
        return Faithfulness(_by_row(names, right), _by_row(names, totals.astype(int)), {}, {})
    other = other[:, has_facts]
    return Faithfulness(
        _by_row(names, right),
        _by_row(names, totals.astype(int)),
        _by_row(names, shares(other.sum(0))),
        _by_row(names, interval(own, other)),
    )


def count_facts(
    seen: Sequence[DetectedScene | None], facts: Sequence[CaptionFacts], control: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """Count correct facts and all facts, [pictures, rows of :data:`ROWS`, 2]: of the pictures' own prompts, and the
    mean over other prompts (None without a control)."""
    own = _counts(seen, facts)
    orders = control_order(len(facts)) if control else []
    if not len(orders):
        return own, None
    return own, np.mean([_counts(seen, [facts[i] for i in order]) for order in orders], axis=0)


def _by_row(names: Sequence[str], values: np.ndarray) -> dict:
    return dict(zip(names, values.tolist()))


def control_order(count: int) -> np.ndarray:
    """The control prompts of ``count`` pictures, int [shuffles, count]: always the same, never a picture's own prompt,
    and all different for each picture."""
    order = np.random.default_rng(SEED).permutation(count)
    prompts = np.empty((min(SHUFFLES, max(count - 1, 0)), count), dtype=int)
    for shift, row in enumerate(prompts, start=1):
        row[order] = np.roll(order, -shift)
    return prompts


def _counts(seen: Sequence[DetectedScene | None], facts: Sequence[CaptionFacts]) -> np.ndarray:
    """Correct facts and all facts, [pictures, rows, 2]."""
    return np.array([_picture_counts(*pair) for pair in zip(seen, facts)], dtype=float)


def _picture_counts(seen: DetectedScene | None, facts: CaptionFacts) -> list[tuple[int, int]]:
    verdict = compare(seen or DetectedScene("", ()), facts)
    kinds = [verdict.facts[kind] for kind in KINDS]
    all_facts = (sum(right for right, _ in kinds), sum(total for _, total in kinds))
    strict = (all_facts[0], all_facts[1] + UNNAMED * verdict.extra)
    objects = len(seen.objects) + seen.unknown if seen else 0
    return [all_facts, strict, (int(verdict.all_right), 1), *kinds, (objects - verdict.extra, objects)]


def shares(totals: np.ndarray) -> np.ndarray:
    """Percentage of correct facts, from [rows, 2] correct and all facts; nan without facts."""
    with np.errstate(invalid="ignore"):
        return 100 * totals[:, 0] / totals[:, 1]


def chance_corrected(right: float, control: float) -> float | None:
    """The share of correct facts above the control's, relative to the most that is possible, in per cent; None if the
    control is 100 %."""
    return 100 * (right - control) / (100 - control) if control < 100 else None


def interval(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """95 % interval [rows, 2] of the difference between the shares, by resampling pictures."""
    random, count = np.random.default_rng(SEED), len(own)
    differences = []
    for _ in range(RESAMPLES):
        weights = np.bincount(random.integers(count, size=count), minlength=count)
        differences.append(shares(np.tensordot(weights, own, 1)) - shares(np.tensordot(weights, other, 1)))
    # A resample may lack kinds of facts that few captions mention.
    return np.nanpercentile(differences, [2.5, 97.5], axis=0).T
