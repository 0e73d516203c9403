"""Units of work: stretches of input files that are read as samples.

Several machines can share the units. A tar, a folder or a compressed file is one unit, since finding its samples means
reading through it; other JSON or JSONL files are cut every ``part_samples`` records. The formats have modules of their
own: :mod:`.webdataset`, :mod:`.energon`, :mod:`.llava`, :mod:`.jsonl`.
"""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from types import ModuleType

from megatron_ext.errors import UserError
from megatron_ext.preprocess import energon, jsonl, llava, webdataset
from megatron_ext.preprocess.samples import ReadOptions, Sample, Unit, no_caption

FORMATS = {".tar": webdataset, ".json": llava, ".jsonl": jsonl, ".jsonl.gz": jsonl, ".jsonl.zip": jsonl}
"""Module by file ending; each has ``units(file, size, part_samples)`` and ``read(unit, options, skip)``."""

TRIED = 64
"""Samples at the start of a file after which a caption that none has is taken for a wrong key."""


def plan(files: list[Path], part_samples: int, split_part: str = "train") -> list[Unit]:
    """The units of all input files, in order.

    Args:
        split_part: the part of data sets in Energon's layout.

    Raises:
        UserError: a file is missing, empty, or of an unknown format.
    """
    return [unit for file in files for unit in _units(Path(file), part_samples, split_part)]


def read(unit: Unit, options: ReadOptions, skip: int = 0) -> Iterator[Sample]:
    """The samples of a unit from sample ``skip`` on.

    Raises:
        UserError: a record is malformed, or none at the start of the file has the caption that is asked for; names the
            file and the record.
    """
    samples = (energon if unit.data_set else _format(unit.file)).read(unit, options, skip)
    if not options.caption or unit.first or skip:
        return samples
    first = list(islice(samples, TRIED))
    lacking = no_caption(options.caption)
    if len(first) == TRIED and all(sample.unusable == lacking for sample in first):
        raise UserError(f"{first[0].name} {lacking}, nor have the {TRIED - 1} samples after it")
    return chain(first, samples)


def identity(file: Path) -> dict:
    """What tells an input from another one of its name: its size in bytes; of a folder also its files."""
    return webdataset.identity(file) if file.is_dir() else {"bytes": file.stat().st_size}


def _format(file: Path) -> ModuleType | None:
    if file.is_dir():
        return webdataset
    return next((module for ending, module in FORMATS.items() if file.name.endswith(ending)), None)


def _units(file: Path, part_samples: int, split_part: str) -> Iterator[Unit]:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    if energon.is_data_set(file):
        return energon.units(file, split_part)
    module = _format(file)
    if module is None:
        raise UserError(
            f"{file}: neither a WebDataset .tar (not compressed), a folder, a LLaVA .json, nor a .jsonl, .jsonl.gz or "
            ".jsonl.zip"
        )
    return module.units(file, size, part_samples)
