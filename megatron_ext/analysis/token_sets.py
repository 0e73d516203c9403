"""The sets of queries and the classes of keys that attention is summed over.

::

    understanding   bos <boi> CODES <eoi> question answer <eod> question answer <eod>
    generation      bos caption <boi> CODES <eoi> <eod>
    interleaved     bos <boi> codes <eoi> instruction <boi> CODES <eoi> question answer <eod>

Special tokens are ``bos``, ``<boi>``, ``<eoi>``, ``<eod>``, the token that ends answers (here ``<eod>``) and padding;
the control tokens that a chat template writes are text. A turn is a question, its answer and the end of the answer.

Keys that are left out: *sinks* and ends. Models park attention that they have no use for on the first token of a
document, whatever it is (arXiv 2309.17453), so sinks are the first token and the special tokens that follow it before
any other: ``bos``, and ``<boi>`` where an image comes first, which know nothing of their document. A ``<boi>`` behind a
caption is no sink, because it can carry the caption. Ends are ``<eod>`` and the token that ends answers.
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
    of the class of its use: its task is understanding where it is given, generation where it is drawn; to a query about
    an object, the tokens that show it are OBJECT."""

    GIVEN_IMAGE = 0
    DRAWN_IMAGE = 1
    TEXT = 2
    ANSWER = 3
    EARLIER_ANSWER = 4
    SPECIAL = 5
    OBJECT = 6


class QuerySet(IntEnum):
    """Queries that are averaged over; a query may be in several sets, or in none.

    ANSWER: the tokens of understanding that predict the answer: the question's last token and the answer's own tokens,
    which predict the answer's next token or its end, but neither ``<boi>`` nor a code. TEXT_AFTER_IMAGE: the tokens
    of understanding that are not image tokens and come after the first image token, special tokens included. IMAGE: the
    image tokens of generation, which are the drawn ones. ANSWER_ABOUT_OBJECT, IMAGE_OF_OBJECT: those of ANSWER whose
    question names an object in the picture, and those of IMAGE that predict an image token that shows an object.
    """

    ANSWER = 0
    TEXT_AFTER_IMAGE = 1
    IMAGE = 2
    ANSWER_ABOUT_OBJECT = 3
    IMAGE_OF_OBJECT = 4


OBJECT_SETS = (QuerySet.ANSWER_ABOUT_OBJECT, QuerySet.IMAGE_OF_OBJECT)
"""The sets that only pictures of known objects have."""


@dataclass
class ObjectTokens:
    """The objects of pictures, as bits of an integer, for each token of b rows of s tokens; int64 [b, s].

    Attributes:
        shows: of an image token, the objects that it shows a part of; else 0.
        about: the objects that a query is about: those that the question of its turn names, or those that the image
            token which it predicts shows; else 0.
    """

    shows: Tensor
    about: Tensor

    def rows(self, start: int, stop: int) -> "ObjectTokens":
        """Rows ``start`` to ``stop`` (views)."""
        return ObjectTokens(self.shows[start:stop], self.about[start:stop])


@dataclass
class TokenSets:
    """The tokens of a micro-batch of b rows of s tokens, by flat index into t = b * s.

    Attributes:
        key_class: [t], int64; without EARLIER_ANSWER, which depends on the query.
        left_out: bool [t], keys that no figure counts: sinks and ends.
        turn: [t], int64; equal for two tokens of one document in the same turn.
        shows, about: [t], int64; see :class:`ObjectTokens`.
        members: bool [t, sets].
    """

    key_class: Tensor
    left_out: Tensor
    turn: Tensor
    shows: Tensor
    about: Tensor
    members: Tensor

    @classmethod
    def of(cls, batch: Batch, special: SpecialTokens, objects: ObjectTokens | None = None) -> "TokenSets":
        """The sets of rows in which no document's first token has a loss.

        Args:
            objects: of the rows; None: the objects of pictures are not known.
        """
        tokens, positions = batch.tokens.flatten(), batch.positions.flatten()
        image = batch.modality.flatten() == Modality.IMAGE
        real = batch.document.flatten() != PADDING_DOCUMENT
        understanding, generation = ((batch.task.flatten() == t) & real for t in (Task.UNDERSTANDING, Task.GENERATION))
        predicts = batch.loss_mask.flatten() > 0
        is_target = predicts.roll(1) & (positions > 0)

        ids = torch.tensor(astuple(special), device=tokens.device)
        is_special = torch.isin(tokens, ids)
        key_class = torch.full_like(tokens, KeyClass.TEXT)
        key_class[understanding & is_target] = KeyClass.ANSWER
        key_class[is_special] = KeyClass.SPECIAL
        key_class[image] = KeyClass.GIVEN_IMAGE
        key_class[image & generation] = KeyClass.DRAWN_IMAGE
        if objects is None:
            objects = ObjectTokens(*torch.zeros(2, tokens.numel(), dtype=torch.int64, device=tokens.device))
        shows, about = objects.shows.flatten(), objects.about.flatten()

        is_end = torch.isin(tokens, ids.new_tensor([special.eod, special.answer_end]))
        is_sink = (positions == 0) | is_special & (_before(~is_special, positions) == 0)
        ends = is_target & (tokens == special.answer_end)
        draws = image.roll(-1) | (tokens.roll(-1) == special.boi)
        answer, drawn = understanding & predicts & ~draws, generation & image
        text_after_image = understanding & ~image & (_before(image, positions) > 0)
        members = [answer, text_after_image, drawn, answer & (about != 0), drawn & (about != 0)]
        turn = ends.cumsum(0) - ends.long()
        return cls(key_class, is_sink | is_end, turn, shows, about, torch.stack(members, dim=1))


def _before(chosen: Tensor, positions: Tensor) -> Tensor:
    """The number of chosen tokens before each token in its document, from bool [t] and the positions [t]."""
    earlier = chosen.cumsum(0) - chosen.long()
    return earlier - earlier[torch.arange(chosen.numel(), device=chosen.device) - positions]
