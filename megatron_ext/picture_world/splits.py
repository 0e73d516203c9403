"""The splits and the held-out combinations of shape and color. Splits never share an arrangement of objects:

* *test*: every picture has at least one object whose shape and color are a pair of :data:`HELD_OUT`;
* *train* and *validation*: no such object, and no caption, question or text names one. An arrangement belongs to
  validation if its hash is 0 modulo :data:`VALIDATION_MODULUS`, to train otherwise.
"""

import hashlib

from megatron_ext.picture_world.attributes import COLORS, SHAPES

HELD_OUT = frozenset((SHAPES[i], COLORS[(3 * i + 1) % len(COLORS)]) for i in range(len(SHAPES)))
"""(shape, color) pairs that only test has: one per shape, one per color."""
VALIDATION_MODULUS = 8
SPLITS = ("train", "validation", "test")
SPLIT_RULE = (
    "test: at least one object of a held-out (shape, color) pair in every scene; "
    "train, validation: no held-out pair in picture, caption, question or text; "
    f"validation: SHA-256 of the arrangement of objects is 0 modulo {VALIDATION_MODULUS}, train: it is not"
)


def split_of(arrangement: str) -> str:
    """``train`` or ``validation``, for an arrangement without held-out pairs."""
    digest = hashlib.sha256(arrangement.encode()).digest()
    return "train" if int.from_bytes(digest[:8], "big") % VALIDATION_MODULUS else "validation"
