"""Records of JSON and JSONL files as samples."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.preprocess.interleaved import interleaved_sample, is_interleaved
from megatron_ext.preprocess.samples import ImageFile, ReadOptions, Sample, Unit, make_sample, naming_errors
from megatron_ext.preprocess.tar_members import ImageFolder

IMAGE_KEYS = ("image", "img_path")
"""Where a record names its images: LLaVA and most others; JourneyDB."""


def cut_records(file: Path, size: int, records: int, part_samples: int) -> Iterator[tuple[int, int, int]]:
    """First record, number of records and share of the file's bytes of each unit.

    Raises:
        UserError: the file has no records.
    """
    if not records:
        raise UserError(f"{file}: holds no sample")
    for first in range(0, records, part_samples):
        count = min(part_samples, records - first)
        yield first, count, size * count // records


def samples_of_records(
    unit: Unit, records: Iterable[tuple[str, object, int]], options: ReadOptions, skip: int
) -> Iterator[Sample]:
    """The samples of (name, record, bytes) of a unit, from the record ``skip`` on.

    Raises:
        UserError: a record is malformed.
    """
    folder = ImageFolder(_image_folder(unit.file, options.images))
    for name, record, size in islice(records, skip, None):
        with naming_errors(name):
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            yield replace(_sample(name, record, folder, options), bytes=size)


def _image_folder(file: Path, images: Path | None) -> Path:
    if images is None:
        return file.parent
    shard = file.name.partition(".jsonl")[0].removesuffix(".json")
    return Path(str(images).replace("{shard}", shard))


def _sample(name: str, record: dict, folder: ImageFolder, options: ReadOptions) -> Sample:
    if is_interleaved(record):
        return interleaved_sample(name, record, folder, options)
    return make_sample(name, record, _images(record, folder), options)


def _images(record: dict, folder: ImageFolder) -> list[ImageFile]:
    key = next((key for key in IMAGE_KEYS if record.get(key) is not None), None)
    paths = record[key] if key else []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"'{key}' is neither a path nor a list of paths")
    return [folder.find(path) for path in paths]
