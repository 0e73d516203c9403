"""Modality and task, the two properties that classify a token throughout the code.

Both are small integers that fit in a batch. They index the table of roles (``routing/plan.py``), the loss is averaged
per task, and no other property of a token decides its route, except for the choice of a dense share.
"""

from enum import IntEnum


class Modality(IntEnum):
    """What a token *is*. ``<boi>`` and ``<eoi>`` are text: they are predicted and queried as text."""

    TEXT = 0
    IMAGE = 1


class Task(IntEnum):
    """What a token's *document* is for.

    UNDERSTANDING: image(s) first, loss on the answers. GENERATION: caption first, loss on the image tokens.
    TEXT: plain text, loss on all of it.
    """

    UNDERSTANDING = 0
    GENERATION = 1
    TEXT = 2


PADDING_DOCUMENT = -1
"""Document number of the padding at the end of a packed row. Padding is of modality TEXT, task TEXT, without loss."""
