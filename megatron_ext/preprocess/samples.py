"""Samples: the documents that input files describe, before an image is opened or a text is tokenised."""

import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT
from megatron_ext.errors import UserError
from megatron_ext.preprocess.record_fields import Filter, first_text

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
        filtered: a filter removes the sample.
        missing: number of images that are left out because they are not there.
        bytes: approximate size in the input file, for the progress bar.
    """

    name: str
    segments: tuple[tuple[int, "str | ImageFile"], ...] = ()
    turns: tuple[tuple[str, int], ...] = ()
    required_mode: int = ANSWER
    unusable: str | None = None
    filtered: bool = False
    missing: int = 0
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
        count: number of its records; None for a whole tar, folder or compressed file.
        offset: byte at which its first record starts (JSON, JSONL).
        data_set: folder of the data set in Energon's layout that the file belongs to.
    """

    file: Path
    bytes: int
    first: int = 0
    count: int | None = None
    offset: int = 0
    data_set: Path | None = None


@dataclass(frozen=True)
class ReadOptions:
    """How records become documents.

    Attributes:
        images: folder of the images; None for that of the input file. ``{shard}`` in it stands for the name of the
            input file without its ending.
        prefer: "conversation" or "caption", for a record with both.
        split_turns: each question with its answer becomes a document of its own.
        chat_template: the vocabulary's chat template writes conversations.
        caption: dotted keys; every record becomes a caption pair with the first text that is found there. Empty: see
            ``prefer``.
        max_tokens: most tokens of a document with images; longer ones are skipped, or cut if they are interleaved.
        image_tokens: tokens of an image, for ``max_tokens``.
        filters: which records are kept; in an interleaved document (:mod:`.interleaved`), which images.
    """

    images: Path | None
    prefer: str
    split_turns: bool = False
    chat_template: bool = False
    caption: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = ()
    max_tokens: int | None = None
    image_tokens: int = 0

    def keeps(self, record: dict) -> bool:
        """Whether all filters keep a record.

        Raises:
            ValueError: the record lacks the key of a filter.
        """
        return all(one.keeps(record) for one in self.filters)


MALFORMED = (ValueError, TypeError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error)


class naming_errors:
    """Turns the errors of reading a malformed record into a UserError that names the record."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, OSError):
            raise UserError(f"{self.name}: {error.strerror or error}") from None
        if isinstance(error, MALFORMED):
            raise UserError(f"{self.name}: {error}") from None


def make_sample(name: str, record: dict, images: Sequence[ImageFile], options: ReadOptions) -> Sample:
    """The sample of a record with ``conversations`` (LLaVA), a caption, or ``text``.

    Raises:
        ValueError: the record has none of these keys, or their values are malformed.
    """
    if not options.keeps(record):
        return Sample(name, filtered=True)
    if options.caption:
        caption = first_text(record, options.caption)
        return _caption(name, caption, images) if caption else Sample(name, unusable=no_caption(options.caption))
    conversation, caption = record.get("conversations") is not None, record.get("caption") is not None
    if conversation and (options.prefer == "conversation" or not caption):
        return _conversation(name, record["conversations"], images)
    if caption:
        return _caption(name, _string(record, "caption"), images)
    if "text" in record:
        return Sample(name, ((TEXT, _string(record, "text")),), required_mode=TEXT)
    raise ValueError("has none of 'conversations', 'caption', 'text'; --caption names the key of a caption")


def no_caption(keys: Sequence[str]) -> str:
    """Why a record without any of these keys of a caption is not usable."""
    return f"has no text at {' or '.join(repr(key) for key in keys)}"


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
