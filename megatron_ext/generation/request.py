"""A document to continue."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.token_classes import Task


@dataclass(frozen=True)
class Request:
    """A document to continue.

    Attributes:
        tokens: the prompt, ``bos`` included; texts and images in any order. A picture follows a prompt that ends in
            ``<boi>``.
        task: of the document; it decides how the tokens are routed.
        text_tokens: most text tokens to generate; generation also ends at ``<eod>`` and at the end of
            an answer.
        images: most pictures to generate; generation ends after the last one.
        unconditional: the prompt without its condition, for classifier-free guidance.
        number: with the seed it decides which tokens are sampled.
    """

    tokens: Sequence[int]
    task: Task
    text_tokens: int = 0
    images: int = 0
    unconditional: Sequence[int] | None = None
    number: int = 0
