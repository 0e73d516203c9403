"""Vocabularies over small SentencePiece models that are trained in a moment."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_ext.vocabulary import Vocabulary
from support.tiny_vq import CODES

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "what",
    "colour",
    "is",
    "this",
    "picture",
    "left",
    "right",
    "two",
    "one",
]


def make_vocabulary(
    folder: Path, codes: int = CODES, sentences: Sequence[str] = (), pieces: int | None = None
) -> Vocabulary:
    """A vocabulary in ``folder`` by LLaMA's conventions.

    Args:
        codes: VQ codes.
        sentences: the text that the model is trained on; by default random words.
        pieces: the exact number of text pieces; by default at most 60.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    sentences = sentences or [" ".join(random.choice(WORDS, 8)) for _ in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "text"),
        vocab_size=pieces or 60,
        minloglevel=2,
        hard_vocab_limit=pieces is not None,
    )
    return Vocabulary.create(folder, folder / "text.model", codes)
