"""The pieces of hidden states that take part."""

from collections.abc import Sequence

import torch
from torch import Tensor


def join(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """``pieces`` one after the other; a single piece as it is, without a copy; none: no rows of ``like``."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces)) if pieces else like[:0]
