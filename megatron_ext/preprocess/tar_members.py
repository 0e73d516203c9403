"""The files in a tar, and images found there by name."""

import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.preprocess.samples import ImageFile, naming_errors

TARS = 8
"""Most tars whose index an :class:`ImageFolder` holds at a time."""


def members(file: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files in a tar that is open, without hidden ones.

    Raises:
        ValueError: the tar is damaged.
    """
    end, name = 0, None
    for member in archive:
        end, name = archive.offset, member.name
        if member.isfile() and not os.path.basename(member.name).startswith("."):
            yield member
    with file.open("rb") as raw:  # tarfile takes a damaged header for the end of the archive
        raw.seek(end)
        if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError(f"damaged after {name}")


class ImageFolder:
    """Images by their path below a folder. A folder on the way may also be a tar of its name: ``000.tar`` for ``000/``.

    The names in the last few tars are kept, so paths should not jump between many tars.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tar_of: dict[str, Path | None] = {}
        self._indices: OrderedDict[Path, dict[str, tuple[int, int]]] = OrderedDict()

    def find(self, path: str) -> ImageFile:
        """The image at ``path``; where there is none, reading it will fail.

        Raises:
            UserError: a tar is damaged.
        """
        place = os.path.normpath(self.folder / path)
        parent = os.path.dirname(place)
        if parent not in self._tar_of:
            self._tar_of[parent] = _tar_of(Path(parent), Path(os.path.normpath(self.folder)))
        if tar := self._tar_of[parent]:
            inside = os.path.relpath(place, tar.with_suffix(""))
            index = self._index(tar)
            for name in (inside, os.path.join(tar.stem, inside)):
                if name in index:
                    return ImageFile(f"{tar}:{name}", str(tar), *index[name])
        return ImageFile(place, place)

    def _index(self, tar: Path) -> dict[str, tuple[int, int]]:
        if tar not in self._indices:
            with naming_errors(str(tar)), tarfile.open(tar, "r:") as archive:
                self._indices[tar] = {
                    os.path.normpath(member.name): (member.offset_data, member.size) for member in members(tar, archive)
                }
            if len(self._indices) > TARS:
                self._indices.popitem(last=False)
        self._indices.move_to_end(tar)
        return self._indices[tar]


def exists(image: ImageFile) -> bool:
    """Whether there is a file, or a member of a tar, for the image."""
    return image.size is not None or os.path.exists(image.file)


def _tar_of(folder: Path, root: Path) -> Path | None:
    """The tar in place of a folder or of one of those above it up to ``root``, None if the folder is there."""
    if folder.is_dir():
        return None
    for place in (folder, *folder.parents):
        if place.name and place.is_relative_to(root) and (tar := place.with_name(f"{place.name}.tar")).is_file():
            return tar
    return None
