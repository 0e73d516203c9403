"""Input files, cut into units of work that several machines can share, and read as samples.

A tar is one unit, since finding its samples means reading through it; a JSON or JSONL file is cut every
``part_samples`` records.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.preprocess import samples
from megatron_ext.preprocess.samples import Image, Sample

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Unit:
    """A stretch of one input file.

    Attributes:
        file: the input file.
        bytes: what it takes of the file, to tell how far the work is.
        first: index of its first record (JSON, JSONL).
        count: number of its records; None for a whole tar.
        offset: byte at which its first line starts (JSONL).
        records: the records themselves (JSON, which can only be read whole).
    """

    file: Path
    bytes: int
    first: int = 0
    count: int | None = None
    offset: int = 0
    records: list | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Reading:
    """How records become samples: the folder of the images (None: that of the input file), and ``--as``."""

    images: Path | None
    prefer: str


def plan(files: list[Path], part_samples: int) -> list[Unit]:
    """The units of all input files, in order.

    Raises:
        UserError: a file is missing, empty, or of an unknown kind.
    """
    return [unit for file in files for unit in _units(Path(file), part_samples)]


def read(unit: Unit, reading: Reading, skip: int = 0) -> Iterator[Sample]:
    """The samples of a unit from sample ``skip`` on.

    Raises:
        UserError: names the file and the record that is not what it should be.
    """
    if unit.count is None:
        yield from _read_tar(unit.file, reading, skip)
        return
    records = _json_records(unit) if unit.records is not None else _jsonl_records(unit)
    for name, record in islice(records, skip, None):
        with _naming(name):
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            images = _record_images(record, reading.images or unit.file.parent)
            yield replace(samples.make(name, record, images, reading.prefer), bytes=unit.bytes // unit.count)


def _units(file: Path, part_samples: int) -> Iterator[Unit]:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    if file.suffix == ".tar":
        yield Unit(file, size)
        return
    if file.suffix not in (".json", ".jsonl"):
        raise UserError(f"{file}: neither a WebDataset .tar (not compressed), a LLaVA .json, nor a .jsonl")
    records = _load_json(file) if file.suffix == ".json" else None
    offsets = _line_offsets(file) if records is None else [0] * len(records)
    if not offsets:
        raise UserError(f"{file}: holds no sample")
    for first in range(0, len(offsets), part_samples):
        stop = min(first + part_samples, len(offsets))
        count = stop - first
        taken = None if records is None else records[first:stop]
        yield Unit(file, size * count // len(offsets), first, count, offsets[first], taken)


def _line_offsets(file: Path) -> list[int]:
    offsets, position = [], 0
    with file.open("rb") as lines:
        for line in lines:
            offsets.append(position)
            position += len(line)
    return offsets


def _load_json(file: Path) -> list:
    with _naming(str(file)):
        records = json.loads(file.read_bytes())
        if not isinstance(records, list):
            raise ValueError("not a list of LLaVA samples")
        return records


def _json_records(unit: Unit) -> Iterator[tuple[str, object]]:
    for index, record in enumerate(unit.records, unit.first):
        yield f"{unit.file}[{index}]", record


def _jsonl_records(unit: Unit) -> Iterator[tuple[str, object]]:
    with unit.file.open("rb") as lines:
        lines.seek(unit.offset)
        for index, line in enumerate(islice(lines, unit.count), unit.first):
            name = f"{unit.file}:{index + 1}"
            if line.strip():
                with _naming(name):
                    record = json.loads(line)
                yield name, record


def _record_images(record: dict, folder: Path) -> list[Image]:
    paths = record.get("image")
    paths = [] if paths is None else [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError("'image' is neither a path nor a list of paths")
    return [Image(name := str(folder / path), name) for path in paths]


def _read_tar(file: Path, reading: Reading, skip: int) -> Iterator[Sample]:
    with _naming(str(file)), tarfile.open(file, "r:") as archive:
        for key, members in islice(_groups(file, archive), skip, None):
            with _naming(f"{file}:{key}"):
                size = sum(tarfile.BLOCKSIZE * (1 + -(-member.size // tarfile.BLOCKSIZE)) for member in members)
                yield replace(_tar_sample(file, archive, key, members, reading.prefer), bytes=size)


def _groups(file: Path, archive: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Consecutive members with one key: WebDataset's key is the path up to the first dot of the name."""
    key, members, end = None, [], 0
    for member in archive:
        end = archive.offset
        if not member.isfile() or os.path.basename(member.name).startswith("."):
            continue
        folder, name = os.path.split(member.name)
        of = os.path.join(folder, name.partition(".")[0])
        if members and of != key:
            yield key, members
            members = []
        key = of
        members.append(member)
    with file.open("rb") as raw:  # tarfile takes a damaged header for the end of the archive
        raw.seek(end)
        if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError(f"damaged after the sample {key}")
    if not members:
        raise ValueError("holds no sample")
    yield key, members


def _tar_sample(file: Path, archive: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], prefer: str) -> Sample:
    record, images, name = {}, [], f"{file}:{key}"
    for member in members:
        suffix = os.path.splitext(member.name)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(Image(f"{file}:{member.name}", str(file), member.offset_data, member.size))
        elif suffix == ".json":
            content = json.loads(archive.extractfile(member).read())
            if not isinstance(content, dict):
                raise ValueError(f"{member.name}: not a JSON object")
            record = {**content, **record}
        elif suffix == ".txt":
            record["caption"] = archive.extractfile(member).read().decode()
    if not record.keys() & {"conversations", "caption", "text"}:
        return Sample(name, unusable="neither a caption nor conversations")
    return samples.make(name, record, images, prefer)


class _naming:
    """Turns what reading a malformed record raises into a UserError that names it."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, OSError):
            raise UserError(f"{self.name}: {error.strerror or error}") from None
        if isinstance(error, (ValueError, TypeError, tarfile.TarError)):
            raise UserError(f"{self.name}: {error}") from None
