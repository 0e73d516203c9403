"""One packed token as one int32, the form in which rows travel from the packer to every rank.

::

    bit  31..29   28      27..26            25     24    23 ............ 0
         unused | start | task or padding | image | loss | token id

Everything else in a :class:`~megatron_ext.data.batch.Batch` follows from these (:mod:`megatron_ext.data.decoding`):
a label is the next token of the same document, documents are counted by their start bits, a position is the distance
to the last start.
"""

TOKEN_BITS = 24
TOKEN = (1 << TOKEN_BITS) - 1
LOSS = 1 << 24
"""The label of this token counts."""
IMAGE = 1 << 25
"""The token is a VQ code."""
TASK_SHIFT = 26
TASK = 0b11 << TASK_SHIFT
START = 1 << 28
"""The token is the first of its document."""
PADDING = 0b11 << TASK_SHIFT
"""In place of a task: the token is padding."""

MAX_VOCABULARY = 1 << TOKEN_BITS
