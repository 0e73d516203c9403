"""Requests over a vocabulary of 60 ids, for tests of generation."""

from dataclasses import replace

import torch

from megatron_ext.generation.document_batch import stored_ids
from megatron_ext.generation.request import Request
from megatron_ext.token_classes import Task

CODES, DEPTH = 20, 4


class TokenIds:
    """A vocabulary of 30 text tokens, ``bos`` among them, the special tokens, and 20 image codes."""

    text_size, bos, pad, eod, boi, eoi, image_offset, size = 30, 1, 30, 31, 32, 33, 40, 60
    ends = [29, 31, 28]

    @staticmethod
    def is_image(ids):
        return (ids >= 40) & (ids < 60)


PICTURE = [TokenIds.bos, 7, 9, TokenIds.boi]
NULL = [TokenIds.bos, TokenIds.boi]
QUESTION = [TokenIds.bos, TokenIds.boi, 41, 52, 43, 44, 45, 46, TokenIds.eoi, 12, 13]
REQUESTS = [
    Request(PICTURE, Task.GENERATION, images=1, unconditional=NULL, number=0),
    Request([TokenIds.bos, 3, 4, 5, 6, TokenIds.boi], Task.GENERATION, images=1, unconditional=NULL, number=1),
    Request(QUESTION, Task.UNDERSTANDING, text_tokens=7, unconditional=QUESTION, number=2),
    Request([TokenIds.bos, 5], Task.GENERATION, text_tokens=3, images=2, unconditional=NULL[:1], number=3),
]
GIVEN, DRAWN = QUESTION[1:9], [TokenIds.boi, 50, 42, 43, 51, 45, 46, TokenIds.eoi]
EDITS = [
    Request(
        [TokenIds.bos, *GIVEN, 12, 13, TokenIds.boi],
        Task.UNDERSTANDING,
        images=1,
        unconditional=[TokenIds.bos, *GIVEN, TokenIds.boi],
        number=4,
    ),
    Request(
        [TokenIds.bos, *GIVEN, 12, *DRAWN, 14, TokenIds.boi],
        Task.UNDERSTANDING,
        images=1,
        unconditional=[TokenIds.bos, *GIVEN, *DRAWN, TokenIds.boi],
        drawn=[1],
        number=5,
    ),
    Request([TokenIds.bos, *GIVEN, 12, *DRAWN, 15], Task.UNDERSTANDING, text_tokens=5, images=1, drawn=[1], number=6),
]


def with_codes(request: Request) -> Request:
    """The request with random codes of a depth of DEPTH in place of its image tokens' only one."""
    random = torch.Generator().manual_seed(0)  # the same for the prompt without its condition: it has the same images

    def stored(tokens: list[int]) -> list[int]:
        images = sum(map(TokenIds.is_image, tokens))
        return stored_ids(TokenIds, tokens, torch.randint(CODES, (images, DEPTH), generator=random).tolist())

    prompts = []
    for tokens in (request.tokens, request.unconditional):
        random.manual_seed(0)
        prompts.append(None if tokens is None else stored(tokens))
    return replace(request, tokens=prompts[0], unconditional=prompts[1])
