"""Units of work: stretches of input files that are read as samples.

Several machines can share the units. A tar is one unit, since finding its samples means reading through it; a JSON or
JSONL file is cut every ``part_samples`` records. The formats have modules of their own: :mod:`.webdataset`,
:mod:`.llava`, :mod:`.jsonl`.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.preprocess import jsonl, llava, webdataset
from megatron_ext.preprocess.samples import ReadOptions, Sample, Unit

FORMATS = {".tar": webdataset, ".json": llava, ".jsonl": jsonl}
"""Module by file ending; each has ``units(file, size, part_samples)`` and ``read(unit, options, skip)``."""


def plan(files: list[Path], part_samples: int) -> list[Unit]:
    """The units of all input files, in order.

    Raises:
        UserError: a file is missing, empty, or of an unknown format.
    """
    return [unit for file in files for unit in _units(Path(file), part_samples)]


def read(unit: Unit, options: ReadOptions, skip: int = 0) -> Iterator[Sample]:
    """The samples of a unit from sample ``skip`` on.

    Raises:
        UserError: a record is malformed; names the file and the record.
    """
    return FORMATS[unit.file.suffix].read(unit, options, skip)


def _units(file: Path, part_samples: int) -> Iterator[Unit]:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    if file.suffix not in FORMATS:
        raise UserError(f"{file}: neither a WebDataset .tar (not compressed), a LLaVA .json, nor a .jsonl")
    return FORMATS[file.suffix].units(file, size, part_samples)
