"""Samples: the documents that input files describe, before an image is opened or a text is tokenised."""

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT
from megatron_ext.errors import UserError

PLACEHOLDER = "<image>"
"""Marks the place of an image in a conversation (LLaVA's convention)."""

ROLES = {"human": "user", "user": "user", "system": "system", "gpt": "assistant", "assistant": "assistant"}
"""Role of a conversation turn, as chat templates call it, by its ``from``."""

MODES = {speaker: ANSWER if role == "assistant" else TEXT for speaker, role in ROLES.items()}
"""Mode of the text of a conversation turn, by its ``from``."""


class ImageFile(NamedTuple):
    """Where the bytes of an image are: a file of its own, or a range of a tar."""

    name: str
    file: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True)
class Sample:
    """A document to be made.

    Attributes:
        name: the input file and the position in it, for messages.
        segments: (mode, text) and (IMAGE or DRAWN, ImageFile), in the document's order.
        turns: of a conversation, the role of each turn and the number of its segments; the role is empty for images
            that have no place in a turn.
        required_mode: a document without text of this mode, ANSWER or TEXT, and without a drawn image is skipped.
        unusable: why the sample cannot become a document, or None.
        bytes: approximate size in the input file, for the progress bar.
    """

    name: str
    segments: tuple[tuple[int, "str | ImageFile"], ...] = ()
    turns: tuple[tuple[str, int], ...] = ()
    required_mode: int = ANSWER
    unusable: str | None = None
    bytes: int = 0

    @property
    def is_caption(self) -> bool:
        """Whether it is images with a caption."""
        return not self.turns and bool(self.segments) and self.segments[-1][0] == ANSWER


@dataclass(frozen=True)
class Unit:
    """A stretch of one input file.

    Attributes:
        file: the input file.
        bytes: the unit's share of the file's size, for the progress bar.
        first: index of its first record (JSON, JSONL).
        count: number of its records; None for a whole tar.
        offset: byte at which its first line starts (JSONL).
        records: the records themselves (JSON, which can only be read whole).
    """

    file: Path
    bytes: int
    first: int = 0
    count: int | None = None
    offset: int = 0
    records: list | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ReadOptions:
    """How records become documents: the folder of the images (None: that of the input file), ``--as``,
    ``--split-turns``, and whether the vocabulary's chat template writes conversations."""

    images: Path | None
    prefer: str
    split_turns: bool = False
    chat_template: bool = False


class naming_errors:
    """Turns the errors of reading a malformed record into a UserError that names the record."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, OSError):
            raise UserError(f"{self.name}: {error.strerror or error}") from None
        if isinstance(error, (ValueError, TypeError, tarfile.TarError)):
            raise UserError(f"{self.name}: {error}") from None


def cut_records(file: Path, size: int, records: int, part_samples: int) -> Iterator[tuple[int, int, int]]:
    """First record, number of records and share of the file's bytes of each unit.

    Raises:
        UserError: the file has no records.
    """
    if not records:
        raise UserError(f"{file}: holds no sample")
    for first in range(0, records, part_samples):
        count = min(part_samples, records - first)
        yield first, count, size * count // records


def samples_of_records(
    unit: Unit, records: Iterable[tuple[str, object]], options: ReadOptions, skip: int
) -> Iterator[Sample]:
    """The samples of (name, record) pairs of a unit, from pair ``skip`` on.

    Raises:
        UserError: a record is malformed.
    """
    for name, record in islice(records, skip, None):
        with naming_errors(name):
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            images = _record_images(record, options.images or unit.file.parent)
            yield replace(make_sample(name, record, images, options.prefer), bytes=unit.bytes // unit.count)


def make_sample(name: str, record: dict, images: Sequence[ImageFile], prefer: str) -> Sample:
    """The sample of a record with ``conversations`` (LLaVA), ``caption``, or ``text``.

    Args:
        prefer: ``"conversation"`` or ``"caption"``, for a record with both.

    Raises:
        ValueError: the record has none of these keys, or their values are malformed.
    """
    conversation, caption = record.get("conversations") is not None, record.get("caption") is not None
    if conversation and (prefer == "conversation" or not caption):
        return _conversation(name, record["conversations"], images)
    if caption:
        return _caption(name, _string(record, "caption"), images)
    if "text" in record:
        return Sample(name, ((TEXT, _string(record, "text")),), required_mode=TEXT)
    raise ValueError("has none of 'conversations', 'caption', 'text'")


def _record_images(record: dict, folder: Path) -> list[ImageFile]:
    paths = record.get("image")
    paths = [] if paths is None else [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError("'image' is neither a path nor a list of paths")
    return [ImageFile(name := str(folder / path), name) for path in paths]


def _caption(name: str, caption: str, images: Sequence[ImageFile]) -> Sample:
    if not images:
        return Sample(name, unusable="a caption without an image")
    return Sample(name, (*((IMAGE, image) for image in images), (ANSWER, caption.strip())))


def _conversation(name: str, turns, images: Sequence[ImageFile]) -> Sample:
    """Each placeholder is replaced by the next image, which is drawn where an answer has it and given elsewhere;
    without placeholders the images come first."""
    if not isinstance(turns, list):
        raise ValueError("'conversations' is not a list")
    texts = [_turn(turn) for turn in turns]
    placeholders = sum(text.count(PLACEHOLDER) for _, text in texts)
    segments, roles = [], []
    if images and not placeholders:
        segments = [(IMAGE, image) for image in images]
        roles = [("", len(images))]
    elif placeholders != len(images):
        return Sample(name, unusable=f"{placeholders} {PLACEHOLDER} placeholders for {len(images)} images")
    remaining = iter(images)
    for speaker, text in texts:
        mode, start = MODES[speaker], len(segments)
        before, *after_images = text.split(PLACEHOLDER)
        parts = [(mode, before.strip())]
        for after in after_images:
            parts += [(DRAWN if mode == ANSWER else IMAGE, next(remaining)), (mode, after.strip())]
        segments += [part for part in parts if part[1]]
        roles.append((ROLES[speaker], len(segments) - start))
    return Sample(name, tuple(segments), tuple(roles))


def _turn(turn) -> tuple[str, str]:
    if not isinstance(turn, dict) or turn.get("from") not in MODES:
        raise ValueError(f"a turn of 'conversations' needs a 'from' that is one of {', '.join(MODES)}")
    return turn["from"], _string(turn, "value")


def _string(record: dict, key: str) -> str:
    if not isinstance(record.get(key), str):
        raise ValueError(f"'{key}' is not a string")
    return record[key]
