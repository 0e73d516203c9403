"""Reading the released files of benchmarks; errors name the file and the entry."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.evaluation.benchmark import Item


def first_file(candidates: Sequence[Path]) -> Path:
    """The first of several candidates that exists.

    Raises:
        UserError: none exists.
    """
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        others = f" (nor {', '.join(map(str, candidates[1:]))})" if candidates[1:] else ""
        raise UserError(f"{candidates[0]}: no such file{others}: give the folder that the benchmark was unpacked in")
    return file


def first_image(candidates: Sequence[Path]) -> Path:
    """The first of several candidates that exists; the first candidate if none does."""
    return next((file for file in candidates if file.is_file()), candidates[0])


def text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def field(entry, key: str, where: str) -> str:
    """``entry[key]``, a non-empty string or a number, as stripped text.

    Raises:
        UserError: there is no such value; the message starts with ``where``.
    """
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise UserError(f"{where}: {key!r} is missing, empty or not text")
    return str(value).strip()


def one_of(value: str, allowed: Sequence[str], what: str, where: str) -> str:
    """``value``, if it is allowed.

    Raises:
        UserError: it is not; the message starts with ``where``.
    """
    if value not in allowed:
        raise UserError(f"{where}: the {what} is {value!r}, not {' or '.join(map(repr, allowed))}")
    return value


def selected_parts(parts: Sequence[str] | None, all_parts: tuple[str, ...], benchmark: str) -> tuple[str, ...]:
    """The parts of a benchmark to read, in its own order; all parts if ``parts`` is None.

    Raises:
        UserError: the benchmark has no such part.
    """
    for part in parts or ():
        if part not in all_parts:
            raise UserError(f"{benchmark} has no part {part!r}; it has {', '.join(all_parts)}")
    return all_parts if parts is None else tuple(part for part in all_parts if part in parts)


def with_suffix(question: str, suffix: str) -> str:
    """The question with the suffix on a new line, unless the released question already ends in it."""
    return question if question.endswith(suffix) else f"{question}\n{suffix}"


def checked(items: Iterable[Item], source: Path) -> list[Item]:
    """The items as a list.

    Raises:
        UserError: there is no item, or an id occurs twice.
    """
    by_id: dict[str, Item] = {}
    for item in items:
        if item.id in by_id:
            raise UserError(f"{source}: question {item.id} occurs twice")
        by_id[item.id] = item
    if not by_id:
        raise UserError(f"{source}: holds no questions")
    return list(by_id.values())
