"""Requests whose prompts have the form of training documents (``preprocess/parts.py``, ``data/rendering.py``).

Where the vocabulary has a chat template it writes questions, as it wrote conversations for training. Captions are plain
text, encoded as they are stored: after their picture.
"""

from collections.abc import Sequence

from megatron_ext import chat_template
from megatron_ext.data.format import ANSWER, IMAGE, TEXT
from megatron_ext.generation.request import Request
from megatron_ext.token_classes import Task
from megatron_ext.vocabulary import Vocabulary


def picture(vocabulary: Vocabulary, caption: str, number: int = 0) -> Request:
    """A picture for a caption: ``bos caption <boi>``; without its condition ``bos <boi>``."""
    tokens = [vocabulary.bos, *vocabulary.encode_segment(caption), vocabulary.boi]
    return Request(tokens, Task.GENERATION, images=1, unconditional=[vocabulary.bos, vocabulary.boi], number=number)


def answer(
    vocabulary: Vocabulary, codes: Sequence[int], question: str, max_new_tokens: int, number: int = 0
) -> Request:
    """An answer to a question about a picture of VQ codes: ``bos <boi> codes <eoi> question``.

    Raises:
        UserError: the chat template cannot write the question.
    """
    image = [vocabulary.boi, *(int(code) + vocabulary.image_offset for code in codes), vocabulary.eoi]
    tokens = [vocabulary.bos]
    for mode, ids in _question(vocabulary, question):
        tokens += image if mode == IMAGE else ids
    return Request(tokens, Task.UNDERSTANDING, text_tokens=max_new_tokens, number=number)


def answer_tokens(vocabulary: Vocabulary, question: str, text: str) -> list[int]:
    """A given answer to a question, as training would have it: its ids and the token that ends it."""
    if vocabulary.chat_template is None:
        return [*vocabulary.encode_segment(text), vocabulary.answer_end]
    turns = [("user", [(IMAGE, None), (TEXT, question)]), ("assistant", [(ANSWER, text)])]
    segments = chat_template.of(vocabulary).segments(turns)
    return [*(i for mode, ids in segments if mode == ANSWER for i in ids), vocabulary.answer_end]


def _question(vocabulary: Vocabulary, question: str) -> chat_template.Segments:
    """A question after a picture; text as token ids."""
    parts = [(IMAGE, None), (TEXT, question)]
    if vocabulary.chat_template is None:
        return [(mode, vocabulary.encode_segment(part) if mode == TEXT else part) for mode, part in parts]
    return chat_template.of(vocabulary).segments([("user", parts)], prompt=True)
