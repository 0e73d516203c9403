"""Counting correct answers; missing and unreadable answers count as wrong."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.evaluation.benchmark import Item


@dataclass(frozen=True)
class Parsed:
    """The parsed answers by item id: None where an answer is missing or unreadable."""

    answer: dict[str, str | None]
    missing: int
    invalid: int

    def right(self, item: Item) -> bool:
        return self.answer[item.id] == item.answer


def parse(items: Sequence[Item], answers: Mapping[str, Any], parser: Callable[[Item, Any], str | None]) -> Parsed:
    """Parse the answer to every item with ``parser``, which returns None for an unreadable answer."""
    parsed = {item.id: parser(item, answers[item.id]) if item.id in answers else None for item in items}
    missing = sum(item.id not in answers for item in items)
    return Parsed(parsed, missing, sum(answer is None for answer in parsed.values()) - missing)


def percent(flags: Iterable[bool]) -> float:
    """Percentage of true flags; 0 without flags, like the precision without a yes."""
    flags = list(flags)
    return 100 * sum(flags) / len(flags) if flags else 0.0


def by_group(items: Sequence[Item]) -> dict[str, list[Item]]:
    """The items of each group, groups in order of first occurrence."""
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
