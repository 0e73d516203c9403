"""Packages that import their members on first use, so that what needs no torch does not import it."""

import importlib
from collections.abc import Callable, Mapping


def lazy_members(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """A package's ``__getattr__`` (PEP 562).

    Args:
        package: its ``__name__``.
        homes: the module of the package that defines each member.
    """

    def member(name: str) -> object:
        if name in homes:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return member
