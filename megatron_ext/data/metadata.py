"""The metadata of a data set, PREFIX.json, and its check against the files."""

import hashlib
import json
from pathlib import Path

from megatron_ext.data import object_store
from megatron_ext.errors import UserError

FORMAT, FORMAT_WITH_DRAWN, FORMAT_WITH_DEPTH = 1, 2, 3
"""Version of the metadata, that of a data set with a ``DRAWN`` image, and that of one with several codes a token."""

COUNTS = ("documents", "sequences", "tokens", "image_tokens", "images")


def file_of(prefix: str | Path, kind: str) -> Path:
    """The file of a data set on disk: "bin", "idx" or "json"."""
    return Path(f"{prefix}.{kind}")


def read_metadata(prefix: str | Path) -> dict:
    """The metadata of the data set at ``prefix``, on disk or in an object store.

    Raises:
        UserError: there is none, or it is not that of a data set.
    """
    file = f"{prefix}.json"
    try:
        metadata = json.loads(object_store.read(file) if object_store.is_remote(file) else Path(file).read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: not found; there is no finished data set at this prefix") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as the metadata of a data set ({error})") from None
    required = {*COUNTS, "vocabulary", "vq", "files", "source"}
    formats = (FORMAT, FORMAT_WITH_DRAWN, FORMAT_WITH_DEPTH)
    if not isinstance(metadata, dict) or metadata.get("format") not in formats or required - metadata.keys():
        raise UserError(f"{file}: not the metadata of a data set of format 1, 2 or 3; prepare the data set again")
    return metadata


def describe(file: Path) -> dict:
    """What the metadata says of a file: its bytes and their sha256."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def check_file(file: Path | str, expected: dict, hashed: bool) -> None:
    """Check the size of a file or object, and its hash if ``hashed``.

    Raises:
        UserError: it is missing, or differs from what the metadata says.
    """
    remote = object_store.is_remote(file)
    if not remote and not Path(file).is_file():
        raise UserError(f"{file}: not found, but its metadata is there; prepare the data set again")
    size = object_store.size(file) if remote else Path(file).stat().st_size
    if size != expected["bytes"]:
        raise UserError(f"{file}: {size} bytes, the metadata says {expected['bytes']}; truncated or replaced")
    if hashed and (object_store.sha256(file) if remote else sha256(file)) != expected["sha256"]:
        raise UserError(f"{file}: sha256 differs from the metadata's; the file was altered")


def index_file(prefix: str, expected: dict) -> Path:
    """The .idx of a data set, checked; of one in an object store the copy in the cache.

    Raises:
        UserError: it is missing, or differs from what the metadata says.
    """
    file = f"{prefix}.idx"
    if object_store.is_remote(prefix):
        file = object_store.cached(file, lambda copy: copy.is_file() and describe(copy) == expected)
    check_file(file, expected, hashed=True)
    return Path(file)


def sha256(file: Path) -> str:
    """Hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
