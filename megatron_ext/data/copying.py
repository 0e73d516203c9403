"""New data sets from finished ones: merging and splitting. Bytes are copied, block by block, so memory stays flat."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_ext.command_line import progress
from megatron_ext.data import counter_random
from megatron_ext.data.format import DRAWN, INDEX_HEADER, INDEX_MAGIC, INT32_CODE, Dataset, format_of, is_image
from megatron_ext.data.metadata import COUNTS, describe
from megatron_ext.data.writer import publish, temporary_files
from megatron_ext.errors import UserError

BLOCK = 1 << 13
"""Documents copied at once."""

REST = None
"""The size of the part of a split that has all other documents."""

_SPLIT = 3  # purpose of random numbers

Choose = Callable[[Dataset, np.ndarray], np.ndarray]
"""The output of each document of a data set: numbers of documents, int64 [n] -> numbers of outputs, [n]."""


def merge(prefixes: Sequence[str | Path], out_prefix: str | Path, source: dict | None = None) -> dict:
    """Join finished data sets into one, in the given order.

    Args:
        source: description of where the data came from; by default those of the data sets.

    Returns:
        The metadata of the result.

    Raises:
        UserError: a data set is damaged, or was made with another vocabulary or VQ model than the first.
    """
    if not prefixes:
        raise UserError(f"{out_prefix}: no data set to merge")
    datasets = [_verified(prefix) for prefix in prefixes]
    first = datasets[0].metadata
    for dataset in datasets:
        for key in ("vocabulary", "vq"):
            if dataset.metadata[key] != first[key]:
                raise UserError(
                    f"{dataset.prefix}.json: '{key}' is {dataset.metadata[key]}, cannot be merged with {first[key]}"
                )
    if source is None:
        source = {"merged": [{"prefix": each.prefix, "source": each.metadata["source"]} for each in datasets]}
    [metadata] = _copy(datasets, {str(out_prefix): source}, lambda _, documents: np.zeros_like(documents), "merging")
    return metadata


def split(prefix: str | Path, sizes: Mapping[str, int | float | None], seed: int = 0) -> list[dict]:
    """Divide a data set at random; documents keep their order.

    Args:
        sizes: by prefix of each new data set its documents: an integer, a share (a float), or REST.
        seed: which documents go where.

    Returns:
        The metadata of each new data set.

    Raises:
        UserError: the data set is damaged, has fewer documents than are asked for, or a new one would have none.
    """
    dataset = _verified(prefix)
    total = len(dataset)
    counts = [round(size * total) if isinstance(size, float) else size for size in sizes.values()]
    rest = total - sum(count for count in counts if count is not REST)
    counts = [rest if count is REST else count for count in counts]
    if rest < 0 or min(counts) < 1:
        raise UserError(f"{prefix}: {total:,} documents cannot be divided into {', '.join(map(str, counts))}")
    ends, key = np.cumsum(counts), counter_random.key(seed, _SPLIT)
    origin = {"prefix": str(prefix), "documents": total, "seed": seed, "source": dataset.metadata["source"]}

    def choose(_: Dataset, documents: np.ndarray) -> np.ndarray:
        return np.searchsorted(ends, counter_random.permute(documents, total, key), side="right")

    sources = {out: {"split": {**origin, "part": i, "parts": counts}} for i, out in enumerate(sizes)}
    return _copy([dataset], sources, choose, "splitting")


def _verified(prefix: str | Path) -> Dataset:
    dataset = Dataset(prefix, verify=True)
    dataset.check_counts()
    return dataset


def _copy(datasets: Sequence[Dataset], sources: Mapping[str, dict], choose: Choose, task: str) -> list[dict]:
    """Copy every document to the new data set that ``choose`` tells."""
    outputs = [_Output(prefix, source, datasets[0].metadata) for prefix, source in sources.items()]
    try:
        for block in _blocks(datasets):
            for number, chosen in _chosen(choose, block):
                outputs[number].count(block, chosen)
        for output in outputs:
            output.open()
        size = sum(dataset.metadata["files"]["bin"]["bytes"] for dataset in datasets)
        with progress(total=size, desc=task, unit="B", unit_scale=True, leave=False) as bar:
            for block in _blocks(datasets):
                tokens = block.tokens()
                for number, chosen in _chosen(choose, block):
                    outputs[number].add(block, chosen, tokens)
                bar.update(tokens.nbytes)
        return [output.finish() for output in outputs]
    finally:
        for output in outputs:
            output.remove()


def _chosen(choose: Choose, block: "_Block") -> Iterator[tuple[int, np.ndarray]]:
    """Each output that gets documents of the block, and which, bool [documents]."""
    numbers = choose(block.dataset, block.documents)
    for number in np.unique(numbers).tolist():
        yield number, numbers == number


class _Block:
    """Consecutive documents of a data set.

    Attributes:
        documents: int64 [n], their numbers.
        sequences: int64 [n], sequences of each.
        lengths, modes: int32 and int8 [sequences].
    """

    def __init__(self, dataset: Dataset, start: int):
        self.dataset = dataset
        self.documents = np.arange(start, min(start + BLOCK, len(dataset)))
        ends = dataset.document_ends[start : start + len(self.documents) + 1]
        self.sequences = np.diff(ends)
        self._first, stop = int(ends[0]), int(ends[-1])
        self.lengths, self.modes = (
            dataset.sequence_lengths[self._first : stop],
            dataset.sequence_modes[self._first : stop],
        )

    def tokens(self) -> np.ndarray:
        """The stored ids, int32."""
        start = int(self.dataset.sequence_pointers[self._first]) // self.dataset.tokens.itemsize
        return self.dataset.tokens[start : start + int(self.lengths.sum(dtype=np.int64))]


def _blocks(datasets: Sequence[Dataset]) -> Iterator[_Block]:
    for dataset in datasets:
        for start in range(0, len(dataset), BLOCK):
            yield _Block(dataset, start)


class _Output:
    """A data set under construction. Its documents are counted before they are added: the lengths of all sequences come
    first in the .idx."""

    def __init__(self, prefix: str, source: dict, model: dict):
        self._prefix = Path(prefix)
        self._files = temporary_files(prefix)
        self._metadata = {
            "format": format_of(model["vq"], drawn=False),
            **dict.fromkeys(COUNTS, 0),
            "vocabulary": model["vocabulary"],
            "vq": model["vq"],
            "source": source,
        }
        self._opened = ExitStack()
        self._digest = hashlib.sha256()

    def count(self, block: _Block, chosen: np.ndarray) -> None:
        """Count the chosen documents of a block, bool [documents]."""
        kept = np.repeat(chosen, block.sequences)
        lengths, modes = block.lengths[kept], block.modes[kept]
        image = is_image(modes)
        tokens = np.where(image, lengths // block.dataset.depth, lengths)
        numbers = (chosen.sum(), len(lengths), tokens.sum(dtype=np.int64), tokens[image].sum(), image.sum())
        for key, number in zip(COUNTS, numbers):
            self._metadata[key] += int(number)
        if (modes == DRAWN).any():
            self._metadata["format"] = format_of(self._metadata["vq"], drawn=True)

    def open(self) -> None:
        """Create the files; all documents are counted."""
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin, self._idx = (self._opened.enter_context(self._files[kind].open("wb")) for kind in ("bin", "idx"))
        documents, sequences = self._metadata["documents"], self._metadata["sequences"]
        self._write_index(0, INDEX_HEADER.pack(INDEX_MAGIC, 1, INT32_CODE, sequences, documents + 1))
        sizes = (4 * sequences, 8 * sequences, 8 * (documents + 1))
        lengths, pointers, ends, modes = INDEX_HEADER.size + np.cumsum([0, *sizes])
        self._places = {"lengths": lengths, "pointers": pointers, "ends": ends, "modes": modes}
        self._sequences, self._bytes = 0, 0
        self._append("ends", np.zeros(1, np.int64))

    def add(self, block: _Block, chosen: np.ndarray, tokens: np.ndarray) -> None:
        """Append the chosen documents of a block, whose ids are ``tokens``."""
        kept = np.repeat(chosen, block.sequences)
        lengths = block.lengths[kept]
        if not kept.all():
            tokens = tokens[np.repeat(kept, block.lengths)]
        content = memoryview(np.ascontiguousarray(tokens)).cast("B")
        self._bin.write(content)
        self._digest.update(content)
        ends = np.cumsum(lengths, dtype=np.int64) * tokens.itemsize
        self._append("lengths", lengths)
        self._append("pointers", self._bytes + ends - lengths * tokens.itemsize)
        self._append("ends", self._sequences + np.cumsum(block.sequences[chosen]))
        self._append("modes", block.modes[kept])
        self._sequences, self._bytes = self._sequences + len(lengths), self._bytes + len(content)

    def finish(self) -> dict:
        """Publish the data set and return its metadata."""
        self._opened.close()
        self._metadata["files"] = {
            "bin": {"bytes": self._bytes, "sha256": self._digest.hexdigest()},
            "idx": describe(self._files["idx"]),
        }
        publish(self._prefix, self._files, self._metadata)
        return self._metadata

    def remove(self) -> None:
        """Remove what is not published."""
        self._opened.close()
        for file in self._files.values():
            file.unlink(missing_ok=True)

    def _append(self, section: str, values: np.ndarray) -> None:
        self._write_index(self._places[section], values.tobytes())
        self._places[section] += values.nbytes

    def _write_index(self, place: int, content: bytes) -> None:
        self._idx.seek(place)
        self._idx.write(content)
