"""One document's continuation: which tokens may come next, and when it ends."""

from megatron_ext.errors import UserError
from megatron_ext.generation.request import Request
from megatron_ext.vocabulary import Vocabulary

TEXT, TEXT_OR_PICTURE, IMAGE_TOKEN = range(3)
"""The kinds of tokens that may come next: text, text or ``<boi>``, an image token."""


class Continuation:
    """The tokens that follow a request's prompt, while they are generated.

    Attributes:
        tokens: the tokens so far; an image token of several codes is the id of its first one.
        done: whether the last of them ended the document.
    """

    def __init__(self, request: Request, vocabulary: Vocabulary, picture_tokens: int):
        """
        Args:
            picture_tokens: image tokens of a picture.

        Raises:
            UserError: the prompt ends in ``<boi>``, but the request has no picture.
        """
        self._request, self._vocabulary, self._picture_tokens = request, vocabulary, picture_tokens
        self.tokens: list[int] = []
        self.done = False
        self._images, self._texts = 0, 0
        self._image_tokens_left = picture_tokens if request.tokens[-1] == vocabulary.boi else 0
        if self._image_tokens_left and not request.images:
            raise UserError("a prompt ends in <boi>, but the request has no picture")
        if not self._image_tokens_left and (forced := self._after_text()) is not None:
            self.append(forced)

    @property
    def allowed_kind(self) -> int:
        """The kind of tokens that may come next."""
        if self._image_tokens_left:
            return IMAGE_TOKEN
        return TEXT_OR_PICTURE if self._images < self._request.images else TEXT

    def append(self, token: int) -> list[int]:
        """Append ``token`` and the tokens that must follow it.

        Returns:
            The tokens that the model must read before the next is sampled; none once the document has ended.
        """
        start, following = len(self.tokens), token
        while following is not None:
            self.tokens.append(following)
            following = self._forced_after(following)
        return [] if self.done else self.tokens[start:]

    def _forced_after(self, token: int) -> int | None:
        """The token that must follow; None: it is sampled, or the document has ended."""
        vocabulary = self._vocabulary
        if self._image_tokens_left:
            self._image_tokens_left -= 1
            return None if self._image_tokens_left else vocabulary.eoi
        if token == vocabulary.boi:
            self._image_tokens_left = self._picture_tokens
            return None
        if token in vocabulary.ends:
            self.done = True
            return None
        if token == vocabulary.eoi:
            self._images += 1
        else:
            self._texts += 1
        return self._after_text()

    def _after_text(self) -> int | None:
        """Outside of a picture: more text (None), ``<boi>``, or the end."""
        if self._images >= self._request.images > 0 or self._texts >= self._request.text_tokens:
            if self._images < self._request.images:
                return self._vocabulary.boi
            self.done = True
        return None
