"""Small steps of reading a benchmark's files, each failing with the file and the entry at fault."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.evaluation.benchmark import Item


def first_file(candidates: Sequence[Path]) -> Path:
    """The first of several places that holds a file.

    Raises:
        UserError: none does.
    """
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        others = f" (nor {', '.join(map(str, candidates[1:]))})" if candidates[1:] else ""
        raise UserError(f"{candidates[0]}: no such file{others}: give the folder that the benchmark was unpacked in")
    return found


def first_image(candidates: Sequence[Path]) -> Path:
    """The first of several places that holds an image; the first place where none does."""
    return next((file for file in candidates if file.is_file()), candidates[0])


def text(path: Path) -> str:
    """A file's text, without the byte order mark that some editors leave.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def field(entry, key: str, where: str) -> str:
    """``entry[key]``, a string or number that is not empty, as stripped text.

    Raises:
        UserError: it is not there, with ``where`` in front.
    """
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise UserError(f"{where}: {key!r} is missing, empty or not text")
    return str(value).strip()


def one_of(value: str, allowed: Sequence[str], what: str, where: str) -> str:
    """``value`` where it is one of those allowed.

    Raises:
        UserError: it is not.
    """
    if value not in allowed:
        raise UserError(f"{where}: the {what} is {value!r}, not {' or '.join(map(repr, allowed))}")
    return value


def chosen(parts: Sequence[str] | None, of: tuple[str, ...], benchmark: str) -> tuple[str, ...]:
    """The parts of a benchmark to be read, in its own order; all where ``parts`` is None.

    Raises:
        UserError: the benchmark has no such part.
    """
    for part in parts or ():
        if part not in of:
            raise UserError(f"{benchmark} has no part {part!r}; it has {', '.join(of)}")
    return of if parts is None else tuple(part for part in of if part in parts)


def with_suffix(question: str, suffix: str) -> str:
    """The prompt: the question, and on a new line the suffix, unless the question as released ends in it."""
    return question if question.endswith(suffix) else f"{question}\n{suffix}"


def checked(items: Iterable[Item], source: Path) -> list[Item]:
    """The items, of which there is at least one and no two have the same id.

    Raises:
        UserError: there is none, or an id occurs twice.
    """
    by_id: dict[str, Item] = {}
    for item in items:
        if item.id in by_id:
            raise UserError(f"{source}: question {item.id} occurs twice")
        by_id[item.id] = item
    if not by_id:
        raise UserError(f"{source}: holds no questions")
    return list(by_id.values())
