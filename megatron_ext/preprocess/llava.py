"""Reading LLaVA JSON: one list of ``{"id", "image", "conversations": [{"from", "value"}, ...]}``."""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.preprocess.samples import ReadOptions, Sample, Unit, cut_records, naming_errors, samples_of_records


def units(file: Path, size: int, part_samples: int) -> Iterator[Unit]:
    """The file, which can only be read whole, in units of ``part_samples`` records.

    Raises:
        UserError: the file is not a list, or is empty.
    """
    with naming_errors(str(file)):
        records = json.loads(file.read_bytes())
        if not isinstance(records, list):
            raise ValueError("not a list of LLaVA samples")
    for first, count, share in cut_records(file, size, len(records), part_samples):
        yield Unit(file, share, first, count, records=records[first : first + count])


def read(unit: Unit, options: ReadOptions, skip: int) -> Iterator[Sample]:
    """The samples of a unit from sample ``skip`` on.

    Raises:
        UserError: a record is malformed.
    """
    records = ((f"{unit.file}[{index}]", record) for index, record in enumerate(unit.records, unit.first))
    return samples_of_records(unit, records, options, skip)
