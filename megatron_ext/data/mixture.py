"""The mixture: the sequence of samples that a run trains on, blended from its sources.

Sample n is a pure function of (seed, n). A *blend* is one round of samples with a fixed order of sources, in which each
source occurs in proportion to its weight; the mixture repeats it. A source shows all its documents, in a new random
order per epoch, before it shows one again. Caption dropout is decided here, too.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from megatron_ext.data import counter_random, reading
from megatron_ext.data.rendering import SpecialTokens, lay_out, text_may_drop
from megatron_ext.data.source import Source
from megatron_ext.data.vq_metadata import depth_of
from megatron_ext.token_classes import Layout

LONGEST_BLEND = 1 << 20
"""Most samples in a blend; weights that need more to be exact are rounded."""

_ORDER, _DROP = 1, 2  # purposes of random numbers


@dataclass(frozen=True)
class Samples:
    """Consecutive samples; every field is [samples].

    Attributes:
        source: number of the source, int64.
        epoch: number of earlier passes over the source, int64.
        document: number of the document in its data set, int64.
        dropped: the caption or instruction is dropped, bool.
        length: rendered tokens, int64.
    """

    source: np.ndarray
    epoch: np.ndarray
    document: np.ndarray
    dropped: np.ndarray
    length: np.ndarray


class Mixture:
    """A blend of sources.

    Attributes:
        sources: list of :class:`Source`.
        special: ids of the special tokens.
        generation_text: generation documents also learn the special tokens around their images.
        vq: the tokenizer of the images (``VQModel.metadata``); None without images.
        depth: codes of an image token.
        blend: int64 [blend length], the source of each sample of a blend.
    """

    def __init__(
        self,
        sources: list[Source],
        special: SpecialTokens,
        seed: int,
        caption_dropout: float,
        generation_text: bool = False,
        depth: int | None = None,
    ):
        """
        Args:
            depth: codes of an image token, which data without images does not say; None: as the data says, or one.
        """
        self.generation_text = generation_text
        self.vq = next((source.metadata["vq"] for source in sources if source.metadata["vq"]), None)
        self.depth = depth or depth_of(self.vq)
        self.sources = sources
        self.special = special
        self.seed = seed
        self.caption_dropout = caption_dropout
        self._counts = blend_counts([source.weight for source in sources])
        self._documents = np.array([source.metadata["documents"] for source in sources])
        self.blend = _interleave(self._counts)
        # Number of earlier samples of the same source in the blend.
        self._rank = np.zeros(len(self.blend), dtype=np.int64)
        for _, own in by_source(self.blend):
            self._rank[own] = np.arange(len(own))

    def samples(self, start: int, stop: int) -> Samples:
        """Samples ``start`` to ``stop``."""
        n = np.arange(start, stop)
        blends, place = np.divmod(n, len(self.blend))
        source = self.blend[place]
        position = blends * np.array(self._counts)[source] + self._rank[place]  # among the samples of its source
        documents = self._documents[source]
        epoch, index = np.divmod(position, documents)
        keys = counter_random.key(self.seed, _ORDER, source, epoch)
        document = counter_random.permute(index, documents, keys)
        length, dropped = np.zeros_like(n), np.zeros(len(n), dtype=bool)
        for number, own in by_source(source):
            opened = self.sources[number]
            reading.note(f"{opened.dataset.prefix}.idx")
            if opened.layout in (Layout.GENERATION, Layout.INTERLEAVED) and self.caption_dropout:
                dropped[own] = counter_random.uniform(self.seed, _DROP, n[own]) < self.caption_dropout
                dropped[own] &= text_may_drop(opened.dataset, document[own], opened.layout)
            length[own] = lay_out(opened.dataset, document[own], dropped[own], opened.layout).length
        return Samples(source, epoch, document, dropped, length)

    @property
    def epoch_samples(self) -> list[float]:
        """Samples of the mixture in one epoch of each source."""
        counts = zip(self._counts, self.sources)
        return [source.metadata["documents"] * len(self.blend) / count for count, source in counts]

    @property
    def mean_length(self) -> float:
        """Mean tokens of a sample, before caption dropout."""
        totals = (count * s.tokens / s.metadata["documents"] for count, s in zip(self._counts, self.sources))
        return sum(totals) / sum(self._counts)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that the samples depend on."""
        description = {
            "seed": self.seed,
            "caption_dropout": self.caption_dropout,
            "counts": self._counts,
            "sources": [[int(source.layout), source.metadata["files"]] for source in self.sources],
            **({"generation_text": True} if self.generation_text else {}),
        }
        return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]

    def tree(self, rows: int | None = None, row_length: int | None = None) -> str:
        """The mixture as a printed tree.

        Args:
            rows, row_length: size of the run, to add its epochs of each source.
        """
        samples = rows * row_length / self.mean_length if rows else None
        documents = sum(source.metadata["documents"] for source in self.sources)
        tokens = sum(source.tokens for source in self.sources)
        lines = [
            f"mixture {self.fingerprint}: {documents:,} documents, {tokens:,} tokens, "
            f"caption dropout {self.caption_dropout:g}, seed {self.seed}"
        ]
        for number, source in enumerate(self.sources):
            last = number == len(self.sources) - 1
            lines.append(f"{'└──' if last else '├──'} {source.layout.name.lower()}: {source.path}")
            lines += [f"{'   ' if last else '│  '}     {line}" for line in self._details(number, samples)]
        return "\n".join(lines)

    def _details(self, number: int, samples: float | None) -> list[str]:
        source = self.sources[number]
        metadata, documents, share = (
            source.metadata,
            source.metadata["documents"],
            self._counts[number] / sum(self._counts),
        )
        token_share = share * source.tokens / documents / self.mean_length
        fingerprints = {"vocabulary": metadata["vocabulary"], "data": metadata["files"]["bin"]["sha256"][:16]}
        if metadata["vq"]:
            fingerprints["VQ"] = metadata["vq"]["fingerprint"]
        plain = [f"{source.plain:,} documents without answers and drawn images: all their text is learnt"]
        return [
            f"{documents:,} documents, {source.tokens:,} tokens ({source.tokens / documents:.0f} a document), "
            f"{metadata['images']:,} images",
            f"weight {source.weight:g}: {share:.1%} of documents, {token_share:.1%} of tokens"
            + (f", {samples * share / documents:.2f} epochs in this run" if samples else ""),
            *(plain if source.plain else []),
            ", ".join(f"{kind} {fingerprint}" for kind, fingerprint in fingerprints.items()),
        ]

    def __str__(self) -> str:
        return self.tree()


def by_source(source: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each number in ``source`` [n], and where it stands there, ascending: the work grows with n, not with the number
    of sources."""
    order = np.argsort(source, kind="stable")
    for own in np.split(order, np.flatnonzero(np.diff(source[order])) + 1) if len(order) else ():
        yield int(source[own[0]]), own


def blend_counts(weights: list[float]) -> list[int]:
    """Samples of each source in a blend: the smallest integers in the ratio of the weights."""
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    length = lcm(*(share.denominator for share in shares))
    if length <= LONGEST_BLEND:
        return [int(share * length) for share in shares]
    return [max(1, round(share * LONGEST_BLEND)) for share in shares]


def _interleave(counts: list[int]) -> np.ndarray:
    """The sources of a blend, each spread evenly over it."""
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts] or [np.zeros(0)])
    source = np.repeat(np.arange(len(counts)), counts)
    return source[np.lexsort((source, times))]
