"""What data sets hold, counted from their indices: documents, tokens by kind, lengths, images per document."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.command_line import progress
from megatron_ext.data.format import ANSWER, DRAWN, IMAGE, TEXT, Dataset, is_image

KINDS = {TEXT: "context text", ANSWER: "answers", IMAGE: "given images", DRAWN: "drawn images"}
"""Kinds of tokens, by the mode of their sequence."""

QUANTILES = (0.5, 0.9, 0.99)

BLOCK = 1 << 16
"""Documents counted at once."""


@dataclass
class Statistics:
    """Counts over some data sets. Tokens are stored ones: rendering adds special tokens.

    Attributes:
        tokens, sequences: by mode.
        lengths: int64 [longest + 1], documents by their tokens.
        images: int64 [most + 1], documents by their images.
    """

    tokens: dict[int, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    sequences: dict[int, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    images: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    @classmethod
    def of(cls, datasets: Sequence[Dataset]) -> "Statistics":
        """Count all documents of the data sets, block by block."""
        counted = cls()
        total = sum(map(len, datasets))
        with progress(total=total, desc="counting", unit=" documents", unit_scale=True, leave=False) as bar:
            for dataset in datasets:
                for start in range(0, len(dataset), BLOCK):
                    stop = min(start + BLOCK, len(dataset))
                    counted._add(dataset, start, stop)
                    bar.update(stop - start)
        return counted

    def _add(self, dataset: Dataset, start: int, stop: int) -> None:
        ends = dataset.document_ends[start : stop + 1]
        block = slice(int(ends[0]), int(ends[-1]))
        modes, tokens = dataset.sequence_modes[block], dataset.token_counts(block)
        for mode in KINDS:
            own = modes == mode
            self.sequences[mode] += int(own.sum())
            self.tokens[mode] += int(tokens[own].sum(dtype=np.int64))
        firsts = ends[:-1] - ends[0]
        self.lengths = _sum(self.lengths, np.bincount(np.add.reduceat(tokens, firsts, dtype=np.int64)))
        self.images = _sum(self.images, np.bincount(np.add.reduceat(is_image(modes), firsts, dtype=np.int64)))

    @property
    def documents(self) -> int:
        return int(self.lengths.sum())

    def quantile(self, share: float) -> int:
        """The least length, tokens, that at least a ``share`` of the documents do not exceed."""
        return int(np.searchsorted(np.cumsum(self.lengths), share * self.documents))

    def numbers(self) -> dict:
        """The counts, for JSON. ``length_histogram``: documents of 1, of 2 .. 3, of 4 .. 7, ... tokens."""
        tokens = sum(self.tokens.values())
        return {
            "documents": self.documents,
            "tokens": tokens,
            "tokens_by_kind": {name: self.tokens[mode] for mode, name in KINDS.items()},
            "sequences_by_kind": {name: self.sequences[mode] for mode, name in KINDS.items()},
            "length": {
                "mean": tokens / self.documents,
                **{f"{share:.0%}": self.quantile(share) for share in QUANTILES},
                "longest": len(self.lengths) - 1,
            },
            "length_histogram": [[first, last, count] for first, last, count in self._histogram()],
            "images_per_document": {str(count): int(n) for count, n in enumerate(self.images) if n},
        }

    def _histogram(self) -> list[tuple[int, int, int]]:
        """First and last length of each power of two, and documents of these lengths."""
        bins = [(1 << i, (2 << i) - 1) for i in range((len(self.lengths) - 1).bit_length())]
        counts = [(first, last, int(self.lengths[first : last + 1].sum())) for first, last in bins]
        while counts and not counts[0][2]:
            del counts[0]
        return counts

    def table(self) -> str:
        """The counts as text."""
        numbers = self.numbers()
        length = ", ".join(f"{name} {value:,.0f}" for name, value in numbers["length"].items())
        lines = [f"{self.documents:,} documents, {numbers['tokens']:,} tokens", f"tokens of a document: {length}"]
        for mode, name in KINDS.items():
            if self.sequences[mode]:
                share = self.tokens[mode] / numbers["tokens"]
                lines.append(
                    f"  {name:14} {self.tokens[mode]:>18,} tokens {share:6.1%}, {self.sequences[mode]:,} sequences"
                )
        lines.append("documents by tokens:")
        lines += _bars([(f"{first:,} .. {last:,}", count) for first, last, count in numbers["length_histogram"]])
        lines.append("documents by images:")
        lines += _bars(list(numbers["images_per_document"].items()))
        return "\n".join(lines)


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two arrays [n] and [m], the shorter one continued by zeros."""
    long, short = (a, b) if len(a) >= len(b) else (b, a)
    result = long.astype(np.int64)
    result[: len(short)] += short
    return result


def _bars(counts: list[tuple[str, int]]) -> list[str]:
    most = max(count for _, count in counts)
    return [f"  {name:>22} {count:>14,} {'#' * round(40 * count / most)}" for name, count in counts]
