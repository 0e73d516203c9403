"""Reading JSONL, also compressed: a line is ``{"image", "caption"}``, ``{"text"}``, a LLaVA sample or an
interleaved document (:mod:`.interleaved`); empty lines are skipped."""

import gzip
import json
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from megatron_ext.preprocess.records import cut_records, samples_of_records
from megatron_ext.preprocess.samples import ReadOptions, Sample, Unit, naming_errors


def units(file: Path, size: int, part_samples: int) -> Iterator[Unit]:
    """The file in units of ``part_samples`` lines; a compressed file, which is read from its start, is one unit.

    Raises:
        UserError: the file is empty.
    """
    if file.suffix != ".jsonl":
        yield Unit(file, size)
        return
    offsets = _line_offsets(file)
    for first, count, share in cut_records(file, size, len(offsets), part_samples):
        yield Unit(file, share, first, count, offset=offsets[first])


def read(unit: Unit, options: ReadOptions, skip: int) -> Iterator[Sample]:
    """The samples of a unit from sample ``skip`` on.

    Raises:
        UserError: a line is malformed, or the compressed file is damaged.
    """
    return samples_of_records(unit, _records(unit), options, skip)


def _line_offsets(file: Path) -> list[int]:
    offsets, position = [], 0
    with file.open("rb") as lines:
        for line in lines:
            offsets.append(position)
            position += len(line)
    return offsets


def _records(unit: Unit) -> Iterator[tuple[str, object, int]]:
    with naming_errors(str(unit.file)), ExitStack() as opened:
        raw = opened.enter_context(unit.file.open("rb"))
        raw.seek(unit.offset)
        lines = opened.enter_context(_decompressed(unit.file, raw)) if unit.count is None else raw
        for index, line, size in _sized(islice(lines, unit.count), raw, unit.count is None):
            name = f"{unit.file}:{unit.first + index + 1}"
            if line.strip():
                with naming_errors(name):
                    record = json.loads(line)
                yield name, record, size


def _sized(lines: Iterable[bytes], raw: BinaryIO, compressed: bool) -> Iterator[tuple[int, bytes, int]]:
    """Index, content and bytes of each line; of a compressed file, the bytes that were read since the last line."""
    read = 0
    for index, line in enumerate(lines):
        if compressed:
            before, read = read, raw.tell()
        yield index, line, read - before if compressed else len(line)


def _decompressed(file: Path, raw: BinaryIO) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(raw)
    archive = zipfile.ZipFile(raw)
    names = [name for name in archive.namelist() if name.endswith(".jsonl") and not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise ValueError(f"holds {len(names)} files .jsonl, must be one")
    return archive.open(names[0])
