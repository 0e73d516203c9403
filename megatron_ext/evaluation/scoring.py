"""Counting right answers, with the missing and the unreadable ones among the wrong."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.evaluation.benchmark import Item


@dataclass(frozen=True)
class Parsed:
    """What was said to each question: ``answer[id]`` is it, None where it is missing or unreadable."""

    answer: dict[str, str | None]
    missing: int
    invalid: int

    def right(self, item: Item) -> bool:
        return self.answer[item.id] == item.answer


def parse(items: Sequence[Item], answers: Mapping[str, Any], how: Callable[[Item, Any], str | None]) -> Parsed:
    """Parse the answer to every item with ``how``, which returns None for one that it cannot read."""
    parsed = {item.id: how(item, answers[item.id]) if item.id in answers else None for item in items}
    missing = sum(item.id not in answers for item in items)
    return Parsed(parsed, missing, sum(answer is None for answer in parsed.values()) - missing)


def percent(flags: Iterable[bool]) -> float:
    """The share of true ones; 0 of none, as precision is without a single yes."""
    flags = list(flags)
    return 100 * sum(flags) / len(flags) if flags else 0.0


def by_group(items: Sequence[Item]) -> dict[str, list[Item]]:
    """The items under each of their groups, groups in the order in which they first occur."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        for group in item.groups:
            groups.setdefault(group, []).append(item)
    return groups


def accuracies(items: Sequence[Item], right: Callable[[Item], bool]) -> dict[str, dict[str, float]]:
    """Accuracy in percent and number of questions of every group."""
    return {
        group: {"accuracy": percent(map(right, members)), "questions": len(members)}
        for group, members in by_group(items).items()
    }
