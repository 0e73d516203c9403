"""A document to continue."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_ext.token_classes import Task
from megatron_ext.vocabulary import Vocabulary

GUIDANCE = {"captions": 3.0, "edits": 1.5}
"""Usual scales of classifier-free guidance. A picture that follows its instruction too closely keeps less of the given
one: of edits on the picture world, 62 % of the pictures were wholly right at 1.5, 36 % at 3."""


@dataclass(frozen=True)
class Request:
    """A document to continue.

    Attributes:
        tokens: the prompt, ``bos`` included; texts and images in any order, an image token of D codes as D ids. A
            picture follows a prompt that ends in ``<boi>``.
        task: of the prompt's and of generated tokens, except those of drawn images, which are of GENERATION; it decides
            how they are routed. UNDERSTANDING: of an interleaved document, too.
        text_tokens: most text tokens to generate; generation also ends at ``<eod>`` and at the end of an answer.
        images: most pictures to generate; generation ends after the last one.
        unconditional: the prompt without its condition, for classifier-free guidance; with the same images.
        drawn: numbers, from 0, of the prompt's images that were drawn in the course of the document.
        number: with the seed it decides which tokens are sampled.
    """

    tokens: Sequence[int]
    task: Task
    text_tokens: int = 0
    images: int = 0
    unconditional: Sequence[int] | None = None
    drawn: Collection[int] = ()
    number: int = 0

    def prompt_tasks(self, prompt: Sequence[int], vocabulary: Vocabulary) -> list[Task]:
        """The task of each token of ``tokens`` or of ``unconditional``."""
        image, tasks = -1, []
        for token in prompt:
            image += token == vocabulary.boi
            tasks.append(self.generated_task(token, vocabulary) if image in self.drawn else self.task)
        return tasks

    def generated_task(self, token: int, vocabulary: Vocabulary) -> Task:
        """The task of a generated token."""
        return Task.GENERATION if vocabulary.is_image(token) else self.task
