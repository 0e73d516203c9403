"""Captions that guide the training of a tokenizer (VILA-U, arXiv 2409.04429; SigLIP, arXiv 2303.15343).

Quantized latents go through a block and a pooling head, captions through a small text encoder that is trained along;
the sigmoid loss asks of every picture and every caption of a batch whether they belong together. None of it is part of
the tokenizer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS = 128, 4


class Alignment(nn.Module):
    """Pictures and captions as unit vectors.

    Args:
        captions: of the training pictures; their words are the text encoder's vocabulary, all others are one.
        embed_dim: width of a latent.
        positions: latents of a picture.
    """

    def __init__(self, captions: list[str], embed_dim: int, positions: int):
        super().__init__()
        words = sorted({word for caption in captions for word in _words(caption)})
        self._ids = {word: number for number, word in enumerate(words, 2)}  # 0: no word, 1: an unknown one
        self._length = max(len(_words(caption)) for caption in captions)
        self.words = nn.Embedding(len(words) + 2, WIDTH)
        self.word_positions = nn.Parameter(0.02 * torch.randn(self._length, WIDTH))
        self.text_encoder = nn.TransformerEncoder(_block(), 2, enable_nested_tensor=False)
        self.latents = nn.Linear(embed_dim, WIDTH)
        self.image_positions = nn.Parameter(0.02 * torch.randn(positions, WIDTH))
        self.image_block = _block()
        self.probe = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pooling = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def ids(self, captions: list[str]) -> Tensor:
        """int64 [n, words]; what is longer than all training captions is cut."""
        rows = torch.zeros(len(captions), self._length, dtype=torch.int64)
        for row, caption in zip(rows, captions):
            known = [self._ids.get(word, 1) for word in _words(caption)][: self._length]
            row[: len(known)] = torch.tensor(known, dtype=torch.int64)
        return rows

    def text_vectors(self, ids: Tensor) -> Tensor:
        """Captions [n, words] as unit vectors [n, width]."""
        absent = ids == 0
        hidden = self.text_encoder(self.words(ids) + self.word_positions, src_key_padding_mask=absent)
        return F.normalize((hidden * ~absent[..., None]).sum(1), dim=1)

    def image_vectors(self, latents: Tensor) -> Tensor:
        """Quantized latents [n, e, h, w] as unit vectors [n, width]."""
        hidden = self.image_block(self.latents(latents.flatten(2).transpose(1, 2)) + self.image_positions)
        pooled, _ = self.pooling(self.probe.expand(len(hidden), -1, -1), hidden, hidden, need_weights=False)
        return F.normalize(pooled[:, 0], dim=1)

    def loss(self, latents: Tensor, ids: Tensor) -> Tensor:
        """The sigmoid loss of a batch; pictures with equal captions belong to either's."""
        logits = self.image_vectors(latents) @ self.text_vectors(ids).T * self.scale.exp() + self.bias
        return -F.logsigmoid(torch.where(_equal(ids), logits, -logits)).sum(1).mean()

    @torch.no_grad()
    def retrieval(self, latents: Tensor, ids: Tensor) -> dict:
        """How often, in percent, the nearest caption is a picture's own, and how often one drawn at random would be."""
        own = _equal(ids)
        nearest = (self.image_vectors(latents) @ self.text_vectors(ids).T).argmax(1)
        right = own.gather(1, nearest[:, None]).double().mean()
        return {"retrieval": 100 * float(right), "retrieval_by_chance": 100 * float(own.double().mean())}


def _block() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)


def _words(caption: str) -> list[str]:
    return caption.lower().replace(",", " ").replace(".", " ").split() or ["-"]


def _equal(ids: Tensor) -> Tensor:
    return (ids[:, None] == ids[None]).all(2)
