"""Tiny data sets."""

import numpy as np

from megatron_ext.config import SourceConfig
from megatron_ext.data.format import ANSWER, IMAGE, TEXT, is_image
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.data.source import Source
from megatron_ext.data.writer import DatasetWriter
from megatron_ext.vocabulary import Vocabulary

SPECIAL = SpecialTokens(bos=1, pad=100, eod=101, boi=102, eoi=103, answer_end=101)
FIRST_CODE, CODES = 104, 64
GRID = [2, 4]


def vq_metadata(grid=GRID, depth=1, codebook_size=CODES, fingerprint="vq") -> dict:
    """The metadata of a tokenizer with so many codes a token."""
    vq = {"fingerprint": fingerprint, "grid": list(grid), "codebook_size": codebook_size}
    return vq | ({"depth": depth} if depth > 1 else {})


def write(prefix, documents, vocabulary="tiny", grid=GRID, depth=1) -> str:
    """A data set of these documents, each a list of (mode, ids)."""
    with_images = any(is_image(mode) for document in documents for mode, _ in document)
    vq = vq_metadata(grid, depth) if with_images else None
    with DatasetWriter(prefix, vocabulary, vq, {"made": "by a test"}) as writer:
        for document in documents:
            writer.add(document)
    return str(prefix)


def write_pairs(prefix, vocabulary: Vocabulary, texts: list[list[str]], grid=GRID, vq="vq", depth=1) -> str:
    """A data set of random images, each with the texts of its document: questions, and the answer that is learnt."""
    random = np.random.default_rng(0)
    images = vq_metadata(grid, depth, vocabulary.codebook_size, vq)
    with DatasetWriter(prefix, vocabulary.fingerprint, images, {"made": "by a test"}) as writer:
        for *questions, answer in texts:
            codes = random.integers(0, vocabulary.codebook_size, grid[0] * grid[1] * depth)
            writer.add(
                [
                    (IMAGE, vocabulary.image_ids(codes).astype(np.int32)),
                    *((TEXT, np.array(vocabulary.encode(question), np.int32)) for question in questions),
                    (ANSWER, np.array(vocabulary.encode(answer), np.int32)),
                ]
            )
    return str(prefix)


def write_texts(prefix, vocabulary: Vocabulary, texts: list[str]) -> str:
    """A data set of plain texts."""
    with DatasetWriter(prefix, vocabulary.fingerprint, None, {"made": "by a test"}) as writer:
        for text in texts:
            writer.add([(TEXT, np.array(vocabulary.encode(text), np.int32))])
    return str(prefix)


def captions(prefix, count, seed=0, longest=20, depth=1) -> str:
    """Images with captions; the first caption token is different for every document (up to 90 of them)."""
    random = np.random.default_rng(seed)
    return write(
        prefix,
        [
            [
                (IMAGE, FIRST_CODE + random.integers(0, CODES, 8 * depth)),
                (ANSWER, [2 + i % 90, *random.integers(2, 92, random.integers(1, longest))]),
            ]
            for i in range(count)
        ],
        depth=depth,
    )


def texts(prefix, count, seed=0, longest=40) -> str:
    """Plain texts."""
    random = np.random.default_rng(seed)
    return write(prefix, [[(TEXT, random.integers(2, 92, random.integers(1, longest)))] for _ in range(count)])


def mixture(
    *sources, length=64, seed=1, caption_dropout=0.0, special=SPECIAL, generation_text=False, vocabulary="tiny"
) -> Mixture:
    """A mixture of (path, task, weight)."""
    opened = [
        Source.open(f"data.train[{i}]", SourceConfig(path, task, weight), vocabulary, length)
        for i, (path, task, weight) in enumerate(sources)
    ]
    return Mixture(opened, special, seed, caption_dropout, generation_text)
