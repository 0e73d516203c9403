"""Requests whose prompts have the form of training documents (``data/rendering.py``)."""

from collections.abc import Sequence
from itertools import chain

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
    tokens = [vocabulary.bos, *_image(vocabulary, codes), *vocabulary.encode(question)]
    return Request(tokens, Task.UNDERSTANDING, text_tokens=max_new_tokens, number=number)


def edit(
    vocabulary: Vocabulary, pictures: Sequence[Sequence[int]], instructions: Sequence[str], number: int = 0
) -> Request:
    """The picture that the last instruction makes of the last picture.

    Args:
        pictures: VQ codes of the given picture, then of those drawn for all instructions but the last.
        instructions: as many; ``bos <boi> codes <eoi> instruction <boi> codes <eoi> instruction <boi>``. Without the
            condition there are the pictures alone.
    """
    images = [_image(vocabulary, codes) for codes in pictures]
    turns = [[*image, *vocabulary.encode(text)] for image, text in zip(images, instructions, strict=True)]
    tokens, unconditional = ([vocabulary.bos, *chain.from_iterable(parts), vocabulary.boi] for parts in (turns, images))
    drawn = range(1, len(pictures))
    return Request(tokens, Task.UNDERSTANDING, images=1, unconditional=unconditional, drawn=drawn, number=number)


def _image(vocabulary: Vocabulary, codes: Sequence[int]) -> list[int]:
    return [vocabulary.boi, *(int(code) + vocabulary.image_offset for code in codes), vocabulary.eoi]
