"""Which document comes next: a blend of data sets, each used for one task.

Sample n is a pure function of (seed, n). Sources take turns in a fixed pattern that keeps their weights exactly; each
source goes through all its documents in a new random order before it shows one again.
"""

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np

from megatron_ext.config import SourceConfig
from megatron_ext.data import counter_random
from megatron_ext.data.format import Dataset
from megatron_ext.data.rendering import SpecialTokens, lay_out
from megatron_ext.errors import UserError
from megatron_ext.token_classes import Task

LONGEST_BLEND = 1 << 20
"""Samples in one round of turns; weights that need a longer one to be exact are rounded to it."""

_ORDER, _DROP = 1, 2  # what a random number is for
_CHUNK = 1 << 17  # documents looked at together


@dataclass
class Source:
    """One data set used for one task.

    Attributes:
        path: prefix of the data set.
        metadata: its metadata (:mod:`megatron_ext.data.format`).
        tokens: tokens of one pass over the data set as this task renders it, captions included.
        dataset: the open data set; None on a rank that does not read.
    """

    path: str
    task: Task
    weight: float
    metadata: dict
    tokens: int
    dataset: Dataset | None

    @classmethod
    def open(cls, name: str, config: SourceConfig, vocabulary_fingerprint: str, row_length: int) -> "Source":
        """Open and check a source; ``name`` is its key in the configuration, for messages.

        Raises:
            UserError: its files are damaged, its token ids are of another vocabulary, a document is of no use for the
                task, or a document with images is longer than a row.
        """
        name = f"{name} ({config.path})"
        if config.weight <= 0:
            raise UserError(f"{name}: weight {config.weight} must be positive")
        dataset = Dataset(config.path)
        theirs = dataset.metadata["vocabulary"]
        if theirs != vocabulary_fingerprint:
            raise UserError(
                f"{name}: was prepared with vocabulary {theirs}, this run has {vocabulary_fingerprint}; "
                "prepare it again or set data.vocabulary to the one it was made with"
            )
        task = Task[config.task.upper()]
        tokens = 0
        for start in range(0, len(dataset), _CHUNK):
            documents = np.arange(start, min(start + _CHUNK, len(dataset)))
            tokens += _check_documents(name, dataset, documents, task, row_length)
        return cls(config.path, task, config.weight, dataset.metadata, tokens, dataset)


def _check_documents(name: str, dataset: Dataset, documents: np.ndarray, task: Task, row_length: int) -> int:
    layout = lay_out(dataset, documents, np.zeros(len(documents), dtype=bool), task)
    images, answers = (np.bincount(layout.owner, what, len(documents)) for what in (layout.image, layout.answer))
    lengths = layout.length
    useless, why = {
        Task.UNDERSTANDING: (answers == 0, "holds no answer or caption to learn"),
        Task.GENERATION: (images == 0, "holds no image"),
        Task.TEXT: (images > 0, "holds an image"),
    }[task]
    if useless.any():
        raise UserError(
            f"{name}: document {documents[useless.argmax()]} {why}; not usable for task {task.name.lower()}"
        )
    too_long = (images > 0) & (lengths > row_length)
    if too_long.any():
        worst = too_long.argmax()
        raise UserError(
            f"{name}: document {documents[worst]} is {lengths[worst]} tokens long and holds an image, so it cannot be "
            f"cut; raise data.sequence_length ({row_length})"
        )
    return int(lengths.sum())


@dataclass(frozen=True)
class Samples:
    """Consecutive samples; every field is [samples].

    Attributes:
        source: number of the source, int64.
        epoch: how often the source has been gone through before, int64.
        document: number of the document in its data set, int64.
        dropped: its caption is left out, bool.
        length: tokens as rendered, int64.
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
        blend: int64 [blend length], the source of each sample of one round of turns.
    """

    def __init__(self, sources: list[Source], special: SpecialTokens, seed: int, caption_dropout: float):
        self.sources = sources
        self.special = special
        self.seed = seed
        self.caption_dropout = caption_dropout
        self._counts = blend_counts([source.weight for source in sources])
        self.blend = _interleave(self._counts)
        self._rank = np.zeros(len(self.blend), dtype=np.int64)  # how many of the same source came before in the blend
        for number, count in enumerate(self._counts):
            self._rank[self.blend == number] = np.arange(count)

    def samples(self, start: int, stop: int) -> Samples:
        """Samples ``start`` to ``stop``."""
        n = np.arange(start, stop)
        turns, place = np.divmod(n, len(self.blend))
        source = self.blend[place]
        position = turns * np.array(self._counts)[source] + self._rank[place]  # among the samples of its source
        epoch, document, length = (np.zeros_like(n) for _ in range(3))
        dropped = np.zeros(len(n), dtype=bool)
        for number, this in enumerate(self.sources):
            mine = np.flatnonzero(source == number)
            documents = this.metadata["documents"]
            epoch[mine], index = np.divmod(position[mine], documents)
            keys = counter_random.key(self.seed, _ORDER, number, epoch[mine])
            document[mine] = counter_random.permute(index, documents, keys)
            if this.task == Task.GENERATION and self.caption_dropout:
                dropped[mine] = counter_random.uniform(self.seed, _DROP, n[mine]) < self.caption_dropout
            if len(mine):
                length[mine] = lay_out(this.dataset, document[mine], dropped[mine], this.task).length
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
        """16 hexadecimal digits that change with anything that decides the samples."""
        told = {
            "seed": self.seed,
            "caption_dropout": self.caption_dropout,
            "counts": self._counts,
            "sources": [[int(source.task), source.metadata["files"]] for source in self.sources],
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def tree(self, rows: int | None = None, row_length: int | None = None) -> str:
        """The mixture as a printed tree.

        Args:
            rows, row_length: size of the run; adds the epochs that it takes of each source.
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
            lines.append(f"{'└──' if last else '├──'} {source.task.name.lower()}: {source.path}")
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
        return [
            f"{documents:,} documents, {source.tokens:,} tokens ({source.tokens / documents:.0f} a document), "
            f"{metadata['images']:,} images",
            f"weight {source.weight:g}: {share:.1%} of documents, {token_share:.1%} of tokens"
            + (f", {samples * share / documents:.2f} epochs in this run" if samples else ""),
            ", ".join(f"{what} {fingerprint}" for what, fingerprint in fingerprints.items()),
        ]

    def __str__(self) -> str:
        return self.tree()


def blend_counts(weights: list[float]) -> list[int]:
    """How often each source is drawn in one round of turns: the smallest integers in the ratio of the weights."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    length = lcm(*(share.denominator for share in shares))
    if length <= LONGEST_BLEND:
        return [int(share * length) for share in shares]
    return [max(1, round(share * LONGEST_BLEND)) for share in shares]


def _interleave(counts: list[int]) -> np.ndarray:
    """The sources of one round, each spread evenly over it."""
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts] or [np.zeros(0)])
    source = np.repeat(np.arange(len(counts)), counts)
    return source[np.lexsort((source, times))]
