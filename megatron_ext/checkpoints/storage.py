"""Where copies of checkpoints are kept: a folder, or a URL of fsspec. A copy is complete or absent, as a checkpoint is.

This is the only module that imports fsspec, which brings local folders itself; other places need their own package
(s3fs, gcsfs ...).
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.errors import DamageError
from megatron_ext.checkpoints.folder import MARKER
from megatron_ext.errors import UserError

_CHUNK = 1 << 24


def is_url(place: str) -> bool:
    """Whether a place is fsspec's, rather than a path."""
    return "://" in place


def storage(place: str) -> "FolderStorage | UrlStorage":
    """The storage at a path or URL.

    Raises:
        UserError: fsspec does not know the URL, or lacks the package for it.
    """
    return UrlStorage(place) if is_url(place) else FolderStorage(Path(place))


class FolderStorage:
    """``PLACE/checkpoints/iter_NNNNNNN``, where every tool finds them as those of a run."""

    def __init__(self, place: Path):
        self.place = str(place)
        self._folder = place / "checkpoints"

    def iterations(self) -> list[int]:
        """Of the complete checkpoints, rising."""
        return [checkpoint_folder.iteration_of(p) for p in checkpoint_folder.checkpoints(self._folder)]

    def begin(self, iteration: int) -> str:
        """Make room for a checkpoint. The result names it in :meth:`writer` and :meth:`complete`."""
        return str(checkpoint_folder.begin(self._folder, iteration))

    @contextmanager
    def writer(self, target: str, name: str) -> Iterator[BinaryIO]:
        with open(Path(target, name), "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())

    def complete(self, target: str, iteration: int, marker: bytes) -> None:
        """The copied files become a checkpoint."""
        checkpoint_folder.publish(Path(target), iteration, marker)

    @contextmanager
    def reader(self, iteration: int, name: str) -> Iterator[BinaryIO]:
        with open(self._folder / f"iter_{iteration:07d}" / name, "rb") as stream:
            yield stream

    def discard(self, target: str) -> None:
        shutil.rmtree(target, ignore_errors=True)

    def keep_newest(self, count: int) -> None:
        checkpoint_folder.keep_newest(self._folder, count)


class UrlStorage:
    """``URL/checkpoints/iter_NNNNNNN``: objects cannot be renamed, so a checkpoint is complete if its marker is there;
    the marker is written last and deleted first."""

    def __init__(self, place: str):
        import fsspec

        self.place = place
        try:
            self._files, path = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise UserError(f"{place}: {str(error).splitlines()[0]}") from None
        self._folder = f"{path.rstrip('/')}/checkpoints"

    def iterations(self) -> list[int]:
        return [i for i in self._present() if self._is_complete(i)]

    def begin(self, iteration: int) -> str:
        for present in self._present():
            if present == iteration or not self._is_complete(present):
                self._delete(present)
        self._files.makedirs(self._path(iteration), exist_ok=True)
        return self._path(iteration)

    @contextmanager
    def writer(self, target: str, name: str) -> Iterator[BinaryIO]:
        with self._files.open(f"{target}/{name}", "wb") as stream:
            yield stream

    def complete(self, target: str, iteration: int, marker: bytes) -> None:
        self._files.pipe_file(f"{target}/{MARKER}", marker)

    @contextmanager
    def reader(self, iteration: int, name: str) -> Iterator[BinaryIO]:
        with self._files.open(f"{self._path(iteration)}/{name}", "rb") as stream:
            yield stream

    def discard(self, target: str) -> None:
        if self._files.exists(target):
            self._files.rm(target, recursive=True)

    def keep_newest(self, count: int) -> None:
        for iteration in self.iterations()[:-count] if count else []:
            self._delete(iteration)

    def _present(self) -> list[int]:
        """Iterations of which there is anything."""
        self._files.invalidate_cache()
        if not self._files.exists(self._folder):
            return []
        names = [path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._folder, detail=False)]
        return sorted(checkpoint_folder.iteration_of(Path(n)) for n in names if checkpoint_folder.is_checkpoint_name(n))

    def _is_complete(self, iteration: int) -> bool:
        return self._files.exists(f"{self._path(iteration)}/{MARKER}")

    def _path(self, iteration: int) -> str:
        return f"{self._folder}/iter_{iteration:07d}"

    def _delete(self, iteration: int) -> None:
        if self._files.exists(marker := f"{self._path(iteration)}/{MARKER}"):
            self._files.rm_file(marker)
        self.discard(self._path(iteration))


def copy(source: BinaryIO, target: BinaryIO) -> dict:
    """Copy a file; its :func:`~megatron_ext.checkpoints.folder.fingerprint`, from what was read."""
    crc = size = 0
    while chunk := source.read(_CHUNK):
        target.write(chunk)
        crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def files_of(marker: bytes) -> dict[str, dict]:
    """Fingerprint of every file of a checkpoint, from its marker."""
    try:
        return json.loads(marker)["files"]
    except (ValueError, KeyError, TypeError):
        raise DamageError(f"{MARKER} of the copy: damaged, cannot be read") from None
