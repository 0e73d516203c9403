"""Which tokens ask, and what kind of token is asked: the sets and classes that attention is summed over.

::

    understanding   bos <boi> CODES <eoi> question answer <eod> question answer <eod>
    generation      bos caption <boi> CODES <eoi> <eod>

Special are ``bos``, ``<boi>``, ``<eoi>``, ``<eod>`` and padding. A turn is a question with its answer and ``<eod>``.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality, Task


class KeyClass(IntEnum):
    """What a key is. An answer's token is EARLIER_ANSWER to the queries of later turns."""

    IMAGE = 0
    TEXT = 1
    ANSWER = 2
    EARLIER_ANSWER = 3
    SPECIAL = 4


class QuerySet(IntEnum):
    """Queries that are averaged over; a query may be in several sets, or in none.

    ANSWER: of understanding documents, the tokens that predict the answer: the last one of the question and those of
    the answer itself (they predict its next token or ``<eod>``). TEXT_AFTER_IMAGE: of understanding documents, all
    tokens that are not image tokens and come after the first one, special ones included. IMAGE: the image tokens of
    generation documents.
    """

    ANSWER = 0
    TEXT_AFTER_IMAGE = 1
    IMAGE = 2


@dataclass
class TokenSets:
    """The tokens of a micro-batch of b rows of s tokens, by flat index into t = b * s.

    Attributes:
        key_class: [t], int64; no EARLIER_ANSWER, which depends on the query.
        turn: [t], int64; tokens of one document are in the same turn when these are equal.
        members: bool [t, sets].
    """

    key_class: Tensor
    turn: Tensor
    members: Tensor

    @classmethod
    def of(cls, batch: Batch, special: SpecialTokens) -> "TokenSets":
        """Of rows in which no document's first token is learnt."""
        tokens, positions = batch.tokens.flatten(), batch.positions.flatten()
        image = batch.modality.flatten() == Modality.IMAGE
        real = batch.document.flatten() != PADDING_DOCUMENT
        understanding, generation = ((batch.task.flatten() == t) & real for t in (Task.UNDERSTANDING, Task.GENERATION))
        predicts = batch.loss_mask.flatten() > 0
        learnt = predicts.roll(1) & (positions > 0)

        ids = torch.tensor([special.bos, special.pad, special.eod, special.boi, special.eoi], device=tokens.device)
        key_class = torch.full_like(tokens, KeyClass.TEXT)
        key_class[understanding & learnt] = KeyClass.ANSWER
        key_class[torch.isin(tokens, ids)] = KeyClass.SPECIAL
        key_class[image] = KeyClass.IMAGE

        images_before = image.cumsum(0) - image.long()
        of_document = images_before - images_before[torch.arange(tokens.numel(), device=tokens.device) - positions]
        ends = tokens == special.eod
        members = [understanding & predicts, understanding & ~image & (of_document > 0), generation & image]
        return cls(key_class, ends.cumsum(0) - ends.long(), torch.stack(members, dim=1))
