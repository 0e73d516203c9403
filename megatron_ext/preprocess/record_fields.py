"""Values in JSON records by dotted keys, and filters on them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

ABSENT = object()
"""What :func:`value_at` gives where a record has no such key."""


@dataclass(frozen=True)
class Filter:
    """Keeps records whose number at ``key`` lies in [``minimum``, ``maximum``]; ``null`` lies outside."""

    key: str
    minimum: float = -math.inf
    maximum: float = math.inf

    def keeps(self, record: dict) -> bool:
        """Whether the record is kept.

        Raises:
            ValueError: the record has no such key, or its value is not a number.
        """
        value = value_at(record, self.key)
        if value is ABSENT:
            raise ValueError(f"has no '{self.key}' to filter by")
        if value is None:
            return False
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"'{self.key}' is not a number")
        return self.minimum <= value <= self.maximum


def value_at(record: dict, key: str) -> object:
    """The value at a dotted key, ABSENT if there is none: ``Task2.Caption``, ``conversations.1.value``."""
    if key in record:
        return record[key]
    value = record
    for name in key.split("."):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return ABSENT
    return value


def first_text(record: dict, keys: Iterable[str]) -> str | None:
    """The first text at one of these dotted keys that is not blank, without surrounding blanks."""
    for key in keys:
        value = value_at(record, key)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None
