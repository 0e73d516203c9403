"""Modality and task, the two properties that classify a token throughout the code, and the layout of a document.

Modality and task are small integers that fit in a batch. They index the table of roles (``routing/plan.py``), the loss
is averaged per task, and no other property of a token decides its route, except for the choice of a dense share.
"""

from enum import IntEnum


class Modality(IntEnum):
    """What a token *is*. ``<boi>`` and ``<eoi>`` are text: they are predicted and queried as text."""

    TEXT = 0
    IMAGE = 1


class Task(IntEnum):
    """What a token is for: the task of its document or, in interleaved documents, the use of its image.

    UNDERSTANDING: read to answer; a given image. GENERATION: drawn, or the caption of what is drawn. TEXT: plain text.
    """

    UNDERSTANDING = 0
    GENERATION = 1
    TEXT = 2


class Layout(IntEnum):
    """How a document is written (``data/rendering.py``), and so what is learnt and which task its tokens have.

    UNDERSTANDING: image(s) first, loss on the answers. GENERATION: caption first, loss on the image tokens. TEXT: plain
    text, loss on all of it. In these three all tokens have the task of the same name. INTERLEAVED: in the stored order,
    loss on answers and drawn images, or on all text if there are neither; drawn image tokens have the task GENERATION,
    all others UNDERSTANDING.
    """

    UNDERSTANDING = 0
    GENERATION = 1
    TEXT = 2
    INTERLEAVED = 3


PADDING_DOCUMENT = -1
"""Document number of the padding at the end of a packed row. Padding is of modality TEXT, task TEXT, without loss."""
