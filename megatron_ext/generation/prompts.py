"""Requests whose prompts have the form of training documents (``data/rendering.py``)."""

from collections.abc import Sequence

from megatron_ext.generation.request import Request
from megatron_ext.token_classes import Task
from megatron_ext.vocabulary import Vocabulary


def picture(vocabulary: Vocabulary, caption: str, number: int = 0) -> Request:
    """A picture for a caption: ``bos caption <boi>``; without its condition ``bos <boi>``."""
    tokens = [vocabulary.bos, *vocabulary.encode(caption), vocabulary.boi]
    return Request(tokens, Task.GENERATION, images=1, unconditional=[vocabulary.bos, vocabulary.boi], number=number)


def answer(
    vocabulary: Vocabulary, codes: Sequence[int], question: str, max_new_tokens: int, number: int = 0
) -> Request:
    """An answer to a question about a picture of VQ codes: ``bos <boi> codes <eoi> question``."""
    image = [vocabulary.boi, *(int(code) + vocabulary.image_offset for code in codes), vocabulary.eoi]
    tokens = [vocabulary.bos, *image, *vocabulary.encode(question)]
    return Request(tokens, Task.UNDERSTANDING, text_tokens=max_new_tokens, number=number)
