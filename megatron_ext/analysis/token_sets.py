"""The sets of queries and the classes of keys that attention is summed over.

::

    understanding   bos <boi> CODES <eoi> question answer <eod> question answer <eod>
    generation      bos caption <boi> CODES <eoi> <eod>
    interleaved     bos <boi> codes <eoi> instruction <boi> CODES <eoi> question answer <eod>

Special tokens are ``bos``, ``<boi>``, ``<eoi>``, ``<eod>``, the token that ends answers (here ``<eod>``) and padding;
the control tokens that a chat template writes are text. A turn is a question, its answer and the end of the answer.
"""

from dataclasses import astuple, dataclass
from enum import IntEnum

import torch
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task


class KeyClass(IntEnum):
    """The class of a key. To queries of later turns an answer's token is an EARLIER_ANSWER. The tokens of an image are
    of the class of its use: its task is understanding where it is given, generation where it is drawn."""

    GIVEN_IMAGE = 0
    DRAWN_IMAGE = 1
    TEXT = 2
    ANSWER = 3
    EARLIER_ANSWER = 4
    SPECIAL = 5


class QuerySet(IntEnum):
    """Queries that are averaged over; a query may be in several sets, or in none.

    ANSWER: the tokens of understanding that predict the answer: the question's last token and the answer's own tokens,
    which predict the answer's next token or its end, but neither ``<boi>`` nor a code. TEXT_AFTER_IMAGE: the tokens
    of understanding that are not image tokens and come after the first image token, special tokens included. IMAGE: the
    image tokens of generation, which are the drawn ones.
    """

    ANSWER = 0
    TEXT_AFTER_IMAGE = 1
    IMAGE = 2


@dataclass
class TokenSets:
    """The tokens of a micro-batch of b rows of s tokens, by flat index into t = b * s.

    Attributes:
        key_class: [t], int64; without EARLIER_ANSWER, which depends on the query.
        turn: [t], int64; equal for two tokens of one document in the same turn.
        members: bool [t, sets].
    """

    key_class: Tensor
    turn: Tensor
    members: Tensor

    @classmethod
    def of(cls, batch: Batch, special: SpecialTokens) -> "TokenSets":
        """The sets of rows in which no document's first token has a loss."""
        tokens, positions = batch.tokens.flatten(), batch.positions.flatten()
        image = batch.modality.flatten() == Modality.IMAGE
        real = batch.document.flatten() != PADDING_DOCUMENT
        understanding, generation = ((batch.task.flatten() == t) & real for t in (Task.UNDERSTANDING, Task.GENERATION))
        predicts = batch.loss_mask.flatten() > 0
        is_target = predicts.roll(1) & (positions > 0)

        ids = torch.tensor(astuple(special), device=tokens.device)
        key_class = torch.full_like(tokens, KeyClass.TEXT)
        key_class[understanding & is_target] = KeyClass.ANSWER
        key_class[torch.isin(tokens, ids)] = KeyClass.SPECIAL
        key_class[image] = KeyClass.GIVEN_IMAGE
        key_class[image & generation] = KeyClass.DRAWN_IMAGE

        images_before = image.cumsum(0) - image.long()
        images_read = images_before - images_before[torch.arange(tokens.numel(), device=tokens.device) - positions]
        ends = is_target & (tokens == special.answer_end)
        draws = image.roll(-1) | (tokens.roll(-1) == special.boi)
        members = [understanding & predicts & ~draws, understanding & ~image & (images_read > 0), generation & image]
        return cls(key_class, ends.cumsum(0) - ends.long(), torch.stack(members, dim=1))
