"""The exception whose message is meant for the user, and the most common checks that raise it."""

from collections.abc import Collection, Iterable


class UserError(Exception):
    """An error that the user can fix: a wrong key, a missing or damaged file, an impossible size.

    The message is one line that names the file, key or token at fault and suggests a fix. Command-line
    programs print it without a traceback (see :mod:`megatron_ext.command_line`).
    """


def check_at_least_one(section: str, values: object, *keys: str) -> None:
    """Refuse a section of the configuration in which any of ``keys`` is less than 1."""
    for key in keys:
        if (value := getattr(values, key)) < 1:
            raise UserError(f"config: '{section}.{key}' is {value}, must be at least 1")


def check_divisible(name: str, value: int, by: str, divisor: int) -> None:
    """Refuse a ``value`` that is not divisible by ``divisor``; ``name`` and ``by`` name them in the message."""
    if value % divisor:
        divisors = [n for n in range(1, value + 1) if value % n == 0][:8]
        raise UserError(
            f"config: {name} ({value}) is not divisible by {by} ({divisor}); "
            f"take a multiple of {divisor} for the first, or one of {', '.join(map(str, divisors))} for the second"
        )


def check_names(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise a UserError for the first of ``names`` that is not ``known``."""
    for name in names:
        if name not in known:
            raise UserError(f"{what}: unknown name {name!r}, must be of {', '.join(known)}")
