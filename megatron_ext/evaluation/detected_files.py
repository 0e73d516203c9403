"""What picture files show: detection, which takes some 50 ms a picture, is done once per file."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from megatron_ext import files as json_files
from megatron_ext.command_line import progress
from megatron_ext.errors import UserError
from megatron_ext.evaluation.fid import read_picture
from megatron_ext.picture_world import attributes, detected, detection, mosaic, mosaic_detection, render, world
from megatron_ext.picture_world.detected import DetectedObject, DetectedScene
from megatron_ext.picture_world.detection import detect


def saved_file(folder: Path) -> Path:
    """Where the contents of the pictures in ``folder`` are kept."""
    return folder.with_name(f"{folder.name}.detected.json")


def detect_files(files: Mapping[str, Path], saved: Path | None = None) -> dict[str, DetectedScene]:
    """The contents of each picture file that can be read, by id.

    Args:
        saved: a JSON file that keeps the contents; a picture is only looked at if it is new or has changed.

    Raises:
        UserError: a picture does not have the shape of a picture of the picture world.
    """
    kept = _read(saved) if saved else {}
    digests = {id: hashlib.sha256(file.read_bytes()).hexdigest() for id, file in files.items()}
    new = {id: file for id, file in files.items() if digests[id] not in kept}
    pictures = ((id, picture) for id, file in new.items() if (picture := read_picture(file)))
    contents = kept | {digests[id]: scene for id, scene in detect_all(pictures, len(new)).items()}
    if saved and new:
        used = {digest: asdict(contents[digest]) for digest in digests.values() if digest in contents}
        json_files.write_json(saved, {"detector": _detector(), "pictures": used})
    return {id: contents[digest] for id, digest in digests.items() if digest in contents}


def detect_all(pictures: Iterable[tuple[str, object]], count: int) -> dict[str, DetectedScene]:
    """The contents of (id, picture) pairs, pictures in any form that :func:`~.detection.detect` accepts, by id.

    Raises:
        UserError: a picture does not have the shape of a picture of the picture world.
    """
    seen = {}
    for id, picture in progress(pictures, desc="detecting", unit="picture", total=count):
        try:
            seen[id] = detect(picture)
        except ValueError as error:
            raise UserError(f"{id}: {error}") from None
    return seen


def _read(saved: Path) -> dict[str, DetectedScene]:
    """Contents by the SHA-256 of the picture's file; none by another version of the detector."""
    if not saved.is_file() or (record := json_files.read_json(saved))["detector"] != _detector():
        return {}
    return {
        digest: DetectedScene(**(scene | {"objects": tuple(DetectedObject(**o) for o in scene["objects"])}))
        for digest, scene in record["pictures"].items()
    }


def _detector() -> str:
    """Changes with the code that detects."""
    code = [
        Path(module.__file__).read_bytes()
        for module in (attributes, world, render, mosaic, mosaic_detection, detected, detection)
    ]
    return hashlib.sha256(b"".join(code)).hexdigest()
