"""Requests whose prompts have the form of training documents (``preprocess/parts.py``, ``data/rendering.py``).

Where the vocabulary has a chat template it writes questions, as it wrote conversations for training, and captions if
``templates.json`` says so (:mod:`megatron_ext.templates`). Other captions are plain text, encoded as they are stored:
after their picture. Space around texts is left out, as preprocessing leaves it out.
"""

from collections.abc import Sequence

from megatron_ext import chat_template
from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT, is_image
from megatron_ext.generation.request import Request
from megatron_ext.token_classes import Task
from megatron_ext.vocabulary import Vocabulary


def picture(vocabulary: Vocabulary, caption: str, number: int = 0) -> Request:
    """A picture for a caption: ``bos caption <boi>``; without its condition ``bos <boi>``.

    Raises:
        UserError: the chat template cannot be used.
        UnusableConversation: it cannot write the caption.
    """
    if vocabulary.templates.captions == "conversation":
        template = chat_template.of(vocabulary)
        text, unconditional = template.before_picture(caption.strip()), template.before_picture("")
    else:
        text, unconditional = vocabulary.encode_segment(caption.strip()), []
    tokens, unconditional = ([vocabulary.bos, *ids, vocabulary.boi] for ids in (text, unconditional))
    return Request(tokens, Task.GENERATION, images=1, unconditional=unconditional, number=number)


def answer(
    vocabulary: Vocabulary, codes: Sequence[int], question: str, max_new_tokens: int, number: int = 0
) -> Request:
    """An answer to a question about a picture of VQ codes, in the order of ``Session.encode``: ``bos <boi> codes <eoi>
    question``; without ``<boi>`` and ``<eoi>`` where the vocabulary's given images are bare.

    Raises:
        UserError: the chat template cannot be used.
        UnusableConversation: it cannot write the question.
    """
    bare = vocabulary.templates.given_images == "bare"
    tokens = _tokens(vocabulary, [("user", [(IMAGE, codes), (TEXT, question.strip())])], bare)
    return Request(tokens, Task.UNDERSTANDING, text_tokens=max_new_tokens, number=number)


def edit(
    vocabulary: Vocabulary, pictures: Sequence[Sequence[int]], instructions: Sequence[str], number: int = 0
) -> Request:
    """The picture that the last instruction makes of the last picture.

    Args:
        pictures: VQ codes of the given picture, then of those drawn for all instructions but the last.
        instructions: as many; ``bos <boi> codes <eoi> instruction <boi> codes <eoi> instruction <boi>``. Without the
            condition there are the pictures alone.

    Raises:
        UserError: the chat template cannot be used.
        UnusableConversation: it cannot write the instructions.
    """
    first, *more = (instruction.strip() for instruction in instructions)
    turns = [("user", [(IMAGE, pictures[0]), (TEXT, first)])]
    for codes, text in zip(pictures[1:], more, strict=True):
        turns += [("assistant", [(DRAWN, codes)]), ("user", [(TEXT, text)])]
    tokens = [*_tokens(vocabulary, turns), vocabulary.boi]
    images = [token for codes in pictures for token in _image(vocabulary, codes)]
    unconditional, drawn = [vocabulary.bos, *images, vocabulary.boi], range(1, len(pictures))
    return Request(tokens, Task.UNDERSTANDING, images=1, unconditional=unconditional, drawn=drawn, number=number)


def answer_tokens(vocabulary: Vocabulary, question: str, text: str) -> list[int]:
    """A given answer to a question, as training would have it: its ids and the token that ends it.

    Raises:
        UserError, UnusableConversation: as :func:`answer`.
    """
    question, text = question.strip(), text.strip()
    if vocabulary.chat_template is None:
        return [*vocabulary.encode_segment(text), vocabulary.answer_end]
    turns = [("user", [(IMAGE, None), (TEXT, question)]), ("assistant", [(ANSWER, text)])]
    segments = chat_template.of(vocabulary).segments(turns)
    return [*(i for mode, ids in segments if mode == ANSWER for i in ids), vocabulary.answer_end]


def _tokens(vocabulary: Vocabulary, turns: Sequence[chat_template.Turn], bare: bool = False) -> list[int]:
    """A document of turns that begin with an image, up to where an answer begins; images are VQ codes."""
    if vocabulary.chat_template is None:
        segments = [part for _, parts in turns for part in parts]
    else:
        segments = chat_template.of(vocabulary).segments(turns, prompt=True, bare=bare)
    tokens = [vocabulary.bos]
    for mode, item in segments:
        if is_image(mode):
            image = _image(vocabulary, item)
            tokens += image[1:-1] if bare else image
        else:
            tokens += vocabulary.encode_segment(item) if isinstance(item, str) else item
    return tokens


def _image(vocabulary: Vocabulary, codes: Sequence[int]) -> list[int]:
    return [vocabulary.boi, *(int(code) + vocabulary.image_offset for code in codes), vocabulary.eoi]
