"""Sampling of the next token from its logits."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: only the k most likely tokens; 0: all.
        top_p: only the most likely tokens that together have this probability (nucleus; Holtzman et al.,
            arXiv 1904.09751).
        guidance: scale s of classifier-free guidance (``guidance.py``), logits = unconditional + s (conditional -
            unconditional); 1: none.
        seed: with a document's number it decides which tokens are sampled, whatever else is in the batch.

    Raises:
        UserError: a number is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature {self.temperature:g}: must be 0 or more")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k}: must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p:g}: must be above 0 and at most 1")

    def generators(self, numbers: Sequence[int]) -> list[torch.Generator]:
        """A random generator for each document, by its number."""
        digests = (hashlib.sha256(f"{self.seed}:{number}".encode()).digest() for number in numbers)
        # torch's generator on CPUs uses 32 bits of its seed.
        return [torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")) for digest in digests]


def next_tokens(
    logits: Tensor, allowed: Tensor | None, sampling: Sampling, generators: Sequence[torch.Generator]
) -> list[int]:
    """A token, or a VQ code, for each row.

    Args:
        logits: [n, vocabulary]; codes: [n, codebook].
        allowed: the tokens that may come, bool [n, vocabulary]; at least one in every row. None: all.
        generators: of each row; each gives a random number for each of a row's logits.
    """
    logits = logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the tokens before have this mass already
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(beyond, 0))
    noise = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=g) for g in generators])
    return (probabilities / noise.to(logits.device)).argmax(-1).tolist()
