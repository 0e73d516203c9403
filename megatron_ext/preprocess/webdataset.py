"""Reading WebDataset tars: KEY.jpg (or another image), KEY.txt (a caption), KEY.json (a record)."""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from megatron_ext.preprocess.samples import ImageFile, ReadOptions, Sample, Unit, make_sample, naming_errors
from megatron_ext.vq.image_decoder import IMAGE_SUFFIXES


def units(file: Path, size: int, part_samples: int) -> Iterator[Unit]:
    """The whole tar as one unit."""
    yield Unit(file, size)


def read(unit: Unit, options: ReadOptions, skip: int) -> Iterator[Sample]:
    """The samples of a tar from sample ``skip`` on.

    Raises:
        UserError: the tar is damaged, or a record is malformed.
    """
    file = unit.file
    with naming_errors(str(file)), tarfile.open(file, "r:") as archive:
        for key, members in islice(_groups(file, archive), skip, None):
            with naming_errors(f"{file}:{key}"):
                size = sum(tarfile.BLOCKSIZE * (1 + -(-member.size // tarfile.BLOCKSIZE)) for member in members)
                yield replace(_sample(file, archive, key, members, options.prefer), bytes=size)


def _groups(file: Path, archive: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Consecutive members with one key: WebDataset's key is the path up to the first dot of the file name."""
    key, members, end = None, [], 0
    for member in archive:
        end = archive.offset
        if not member.isfile() or os.path.basename(member.name).startswith("."):
            continue
        folder, name = os.path.split(member.name)
        member_key = os.path.join(folder, name.partition(".")[0])
        if members and member_key != key:
            yield key, members
            members = []
        key = member_key
        members.append(member)
    with file.open("rb") as raw:  # tarfile takes a damaged header for the end of the archive
        raw.seek(end)
        if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError(f"damaged after the sample {key}")
    if not members:
        raise ValueError("holds no sample")
    yield key, members


def _sample(file: Path, archive: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], prefer: str) -> Sample:
    record, images, name = {}, [], f"{file}:{key}"
    for member in members:
        suffix = os.path.splitext(member.name)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(ImageFile(f"{file}:{member.name}", str(file), member.offset_data, member.size))
        elif suffix == ".json":
            content = json.loads(archive.extractfile(member).read())
            if not isinstance(content, dict):
                raise ValueError(f"{member.name}: not a JSON object")
            record = {**content, **record}
        elif suffix == ".txt":
            record["caption"] = archive.extractfile(member).read().decode()
    if not record.keys() & {"conversations", "caption", "text"}:
        return Sample(name, unusable="neither a caption nor conversations")
    return make_sample(name, record, images, prefer)
