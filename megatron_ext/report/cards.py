"""Cards: a picture with a text, and with what is right and wrong about it."""

import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from megatron_ext.evaluation.benchmark import Item

_MIN_SIZE = 192  # pixels; smaller pictures are enlarged by whole factors, unsmoothed
_MAX_SIZE = 384  # pixels; larger pictures are shown smaller


class Card(NamedTuple):
    """A picture with a text.

    Attributes:
        png: the picture.
        description: of the picture, for those who do not see it.
        text: lines below the picture.
        marks: (right, words): what is right or wrong.
        label: names the task of the card; empty for none.
    """

    png: bytes
    description: str
    text: str
    marks: tuple[tuple[bool, str], ...] = ()
    label: str = ""


def question_card(png: bytes, item: Item, answer: str, right: bool, title: str = "") -> Card:
    """A picture with a question about it, the model's answer and, if that is wrong, the right one."""
    question = item.question.rpartition("\n")[0] or item.question  # the last line is the instruction
    words = (answer or "(empty)") + ("" if right else f" (right: {item.answer})")
    return Card(png, "the picture of the question", f"{title}{question}", ((right, words),))


def enlarged(picture: Image.Image) -> bytes:
    """PNG of a picture, enlarged if it is small."""
    factor = -(-_MIN_SIZE // min(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, "png", optimize=True)
    return stream.getvalue()


def read_png(file: Path) -> bytes | None:
    """PNG of a picture file in a size to show; None if it cannot be read."""
    try:
        with Image.open(file) as picture:
            picture = picture.convert("RGB")
    except OSError:
        return None
    picture.thumbnail((_MAX_SIZE, _MAX_SIZE))
    return enlarged(picture)
