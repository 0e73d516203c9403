"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

Every document is decoded twice, side by side: after its prompt, and after the prompt without its condition.
"""

from collections.abc import Sequence

from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.generation.request import Request


def guided_prompts(requests: Sequence[Request], scale: float) -> list[Sequence[int]]:
    """The prompts of all requests, then those without their conditions; scale 1: only the former.

    Raises:
        UserError: a request has no prompt without its condition.
    """
    prompts = [request.tokens for request in requests]
    if scale == 1:
        return prompts
    if any(request.unconditional is None for request in requests):
        raise UserError(f"guidance {scale:g} needs a prompt without its condition")
    return prompts + [request.unconditional for request in requests]


def guided_logits(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """The logits to sample from, [rows, vocabulary]."""
    return unconditional + scale * (conditional - unconditional)
