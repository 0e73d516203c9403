"""Reading JSONL: a line is ``{"image", "caption"}``, ``{"text"}`` or a LLaVA sample; empty lines are skipped."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_ext.preprocess.samples import ReadOptions, Sample, Unit, cut_records, naming_errors, samples_of_records


def units(file: Path, size: int, part_samples: int) -> Iterator[Unit]:
    """The file in units of ``part_samples`` lines.

    Raises:
        UserError: the file is empty.
    """
    offsets = _line_offsets(file)
    for first, count, share in cut_records(file, size, len(offsets), part_samples):
        yield Unit(file, share, first, count, offset=offsets[first])


def read(unit: Unit, options: ReadOptions, skip: int) -> Iterator[Sample]:
    """The samples of a unit from sample ``skip`` on.

    Raises:
        UserError: a line is malformed.
    """
    return samples_of_records(unit, _records(unit), options, skip)


def _line_offsets(file: Path) -> list[int]:
    offsets, position = [], 0
    with file.open("rb") as lines:
        for line in lines:
            offsets.append(position)
            position += len(line)
    return offsets


def _records(unit: Unit) -> Iterator[tuple[str, object]]:
    with unit.file.open("rb") as lines:
        lines.seek(unit.offset)
        for index, line in enumerate(islice(lines, unit.count), unit.first):
            name = f"{unit.file}:{index + 1}"
            if line.strip():
                with naming_errors(name):
                    record = json.loads(line)
                yield name, record
