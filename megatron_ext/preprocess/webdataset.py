"""Reading files that share a key: KEY.jpg (or another image), KEY.txt (a caption), KEY.json (a record).

They lie in a WebDataset tar, one sample after the other, or unpacked in a folder, as img2dataset writes both.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

from megatron_ext.errors import UserError
from megatron_ext.preprocess.samples import ImageFile, ReadOptions, Sample, Unit, make_sample, naming_errors
from megatron_ext.preprocess.tar_members import members
from megatron_ext.vq.image_decoder import IMAGE_SUFFIXES


class Member(NamedTuple):
    """A file of a sample: its path in the tar or folder, where its bytes are, its bytes, and its share of progress."""

    path: str
    place: ImageFile
    read: Callable[[], bytes]
    size: int


def units(file: Path, size: int, part_samples: int) -> Iterator[Unit]:
    """A whole tar as one unit; a folder, and each folder in it, as one unit if it has files.

    Raises:
        UserError: a folder holds no file.
    """
    if not file.is_dir():
        yield Unit(file, size)
        return
    empty = True
    for folder, folders, names in os.walk(file):
        folders.sort()
        if names:
            yield Unit(Path(folder), len(names))
            empty = False
    if empty:
        raise UserError(f"{file}: holds no sample")


def identity(folder: Path) -> dict:
    """Number of the files in a folder and below it, their size in bytes, and a hash of their paths and sizes."""
    paths = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names if name[0] != ".")
    files = {os.path.relpath(path, folder): os.path.getsize(path) for path in paths if os.path.isfile(path)}
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:16]
    return {"bytes": sum(files.values()), "files": len(files), "hash": digest}


def read(unit: Unit, options: ReadOptions, skip: int) -> Iterator[Sample]:
    """The samples of a unit from sample ``skip`` on.

    Raises:
        UserError: the tar is damaged, or a record is malformed.
    """
    with naming_errors(str(unit.file)):
        for key, of_key in islice(grouped(unit.file), skip, None):
            name = f"{unit.file}:{key}"
            with naming_errors(name):
                yield replace(sample_of(name, of_key, options), bytes=sum(member.size for member in of_key))


def grouped(file: Path) -> Iterator[tuple[str, list[Member]]]:
    """Each key of a tar or folder, and its files.

    Raises:
        ValueError: the tar is damaged or empty.
    """
    with ExitStack() as opened:
        if file.is_dir():
            members = _in_folder(file)
        else:
            members = _in_tar(file, opened.enter_context(tarfile.open(file, "r:")))
        for key, of_key in groupby(members, lambda member: _key(member.path)):
            yield key, list(of_key)


def _key(path: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.partition(".")[0])


def _in_tar(file: Path, archive: tarfile.TarFile) -> Iterator[Member]:
    empty = True
    for member in members(file, archive):
        place = ImageFile(f"{file}:{member.name}", str(file), member.offset_data, member.size)
        size = tarfile.BLOCKSIZE * (1 + -(-member.size // tarfile.BLOCKSIZE))
        yield Member(member.name, place, lambda member=member: archive.extractfile(member).read(), size)
        empty = False
    if empty:
        raise ValueError("holds no sample")


def _in_folder(folder: Path) -> Iterator[Member]:
    names = (entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    for name in sorted(names, key=lambda name: (_key(name), name)):
        yield Member(name, ImageFile(str(folder / name), str(folder / name)), (folder / name).read_bytes, 1)


def sample_of(name: str, of_key: Iterable[Member], options: ReadOptions) -> Sample:
    """The sample of the files of a key."""
    record, images = {}, []
    for path, place, content_of, _ in of_key:
        suffix = os.path.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(place)
        elif suffix == ".json":
            content = json.loads(content_of())
            if not isinstance(content, dict):
                raise ValueError(f"{path}: not a JSON object")
            record = {**content, **record}
        elif suffix == ".txt":
            record["caption"] = content_of().decode()
    if not (options.caption and images) and not record.keys() & {"conversations", "caption", "text"}:
        return Sample(name, unusable="neither a caption nor conversations")
    return make_sample(name, record, images, options)
