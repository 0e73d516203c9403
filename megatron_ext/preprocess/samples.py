"""Samples: what an input file says a document is, before any image is opened or any text is tokenised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ext.data.format import ANSWER, IMAGE, TEXT

PLACEHOLDER = "<image>"
"""Marks, in a conversation, where an image stands (LLaVA's convention)."""

ROLES = {"human": TEXT, "user": TEXT, "system": TEXT, "gpt": ANSWER, "assistant": ANSWER}
"""Mode of a conversation turn's text by its ``from``."""


class Image(NamedTuple):
    """Where the bytes of an image file lie: a file of its own, or a range of a tar."""

    name: str
    file: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True)
class Sample:
    """One document to be.

    Attributes:
        name: what messages call it, the input file and the place in it.
        segments: (mode, text) and (IMAGE, Image), in the document's order.
        wanted: the mode of which a document must have text, ANSWER or TEXT.
        unusable: why there can be no document, or None.
        bytes: about what it takes in the input file, to tell how far the work is.
    """

    name: str
    segments: tuple[tuple[int, "str | Image"], ...] = ()
    wanted: int = ANSWER
    unusable: str | None = None
    bytes: int = 0


def make(name: str, record: dict, images: Sequence[Image], prefer: str) -> Sample:
    """The sample of a record: ``conversations`` (LLaVA), ``caption``, or ``text``.

    Args:
        prefer: ``"conversation"`` or ``"caption"``, what a record with both becomes.

    Raises:
        ValueError: the record has none of these, or they are not what they should be.
    """
    conversation, caption = record.get("conversations") is not None, record.get("caption") is not None
    if conversation and (prefer == "conversation" or not caption):
        return _conversation(name, record["conversations"], images)
    if caption:
        return _caption(name, _string(record, "caption"), images)
    if "text" in record:
        return Sample(name, ((TEXT, _string(record, "text")),), wanted=TEXT)
    raise ValueError("has none of 'conversations', 'caption', 'text'")


def _caption(name: str, caption: str, images: Sequence[Image]) -> Sample:
    if not images:
        return Sample(name, unusable="a caption without an image")
    return Sample(name, (*((IMAGE, image) for image in images), (ANSWER, caption.strip())))


def _conversation(name: str, turns, images: Sequence[Image]) -> Sample:
    """Each placeholder is replaced by the next image; without any placeholder the images come first."""
    if not isinstance(turns, list):
        raise ValueError("'conversations' is not a list")
    texts = [_turn(turn) for turn in turns]
    marked = sum(text.count(PLACEHOLDER) for _, text in texts)
    segments = []
    if images and not marked:
        segments = [(IMAGE, image) for image in images]
    elif marked != len(images):
        return Sample(name, unusable=f"{marked} {PLACEHOLDER} placeholders for {len(images)} images")
    following = iter(images)
    for mode, text in texts:
        first, *others = text.split(PLACEHOLDER)
        segments.append((mode, first.strip()))
        for piece in others:
            segments += [(IMAGE, next(following)), (mode, piece.strip())]
    return Sample(name, tuple(segment for segment in segments if segment[1]))


def _turn(turn) -> tuple[int, str]:
    if not isinstance(turn, dict) or turn.get("from") not in ROLES:
        raise ValueError(f"a turn of 'conversations' needs a 'from' that is one of {', '.join(ROLES)}")
    return ROLES[turn["from"]], _string(turn, "value")


def _string(record: dict, key: str) -> str:
    if not isinstance(record.get(key), str):
        raise ValueError(f"'{key}' is not a string")
    return record[key]
