"""Files of local checkpoints, one per rank, and how they go from node to node.

``iter_0000040.rank_00003.5f0c9a1e.0b7d2c44.9e1f00aa.local`` is a pickled state. The name, which it gets once it is
written, has all that must be known without reading it: iteration, rank, the start of the run that wrote it, the run's
layout, and the CRC-32 of the content.
"""

import os
import re
import zlib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_NAME = re.compile(r"iter_(\d{7,})\.rank_(\d{5,})\.([0-9a-f]{8})\.([0-9a-f]{8})\.([0-9a-f]{8})\.local")
_PIECE = 1 << 25


@dataclass(frozen=True, order=True)
class LocalFile:
    """What a file's name says.

    Attributes:
        start: of the run that wrote it. Files of one iteration belong together only if they agree here.
        layout: checksum of the run's layout.
        crc: of the content.
    """

    iteration: int
    rank: int
    start: str
    layout: str
    crc: int = 0

    @property
    def name(self) -> str:
        return f"iter_{self.iteration:07d}.rank_{self.rank:05d}.{self.start}.{self.layout}.{self.crc:08x}.local"


def local_files(folder: Path) -> list[LocalFile]:
    """The files in ``folder`` that were written whole, oldest first; what killed runs left is ignored."""
    names = os.listdir(folder) if folder.is_dir() else []
    parts = [match.groups() for name in names if (match := _NAME.fullmatch(name))]
    return sorted(LocalFile(int(i), int(rank), start, layout, int(crc, 16)) for i, rank, start, layout, crc in parts)


def write(folder: Path, file: LocalFile, state: dict) -> LocalFile:
    """Write the state of a rank, as the ``file`` that is returned with its checksum.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    with _Writing(folder, file) as writing:
        torch.save(state, writing)
        return writing.complete()


def read(folder: Path, file: LocalFile) -> dict:
    """The state in a file that :func:`is_whole`, on the host."""
    # The states of random generators are tuples of Python; the file is this run's own.
    return torch.load(folder / file.name, map_location="cpu", weights_only=False)


def is_whole(folder: Path, file: LocalFile) -> bool:
    """Whether the content is what was written. Reads all of it."""
    crc = 0
    try:
        with open(folder / file.name, "rb") as stream:
            while piece := stream.read(_PIECE):
                crc = zlib.crc32(piece, crc)
    except OSError:
        return False
    return crc == file.crc


def exchange(
    folder: Path,
    group: dist.ProcessGroup,
    outgoing: tuple[int, LocalFile | None] | None = None,
    incoming: tuple[int, LocalFile] | None = None,
) -> None:
    """Send a file to one rank while another is received into the folder.

    Args:
        outgoing: the rank to send to, and the file; None instead of a file: the rank receives that there is none.
        incoming: the rank to receive from, and what the file is; its checksum need not be known.

    Raises:
        OSError: this rank could not read or write; its peers have ended the exchange as usual.
    """
    to, file = outgoing or (None, None)
    source, coming = incoming or (None, None)
    failure: OSError | None = None
    with ExitStack() as files:
        stream = files.enter_context(open(folder / file.name, "rb")) if file else None
        about = torch.tensor([os.fstat(stream.fileno()).st_size, file.crc] if file else [0, 0])
        about_coming = torch.zeros_like(about)
        _swap(about, to, about_coming, source, group)
        left, expected = int(about[0]), int(about_coming[0])
        writing = None
        try:
            writing = files.enter_context(_Writing(folder, coming)) if expected else None
        except OSError as error:
            failure = error
        while left or expected:
            piece, into = (torch.empty(min(size, _PIECE), dtype=torch.uint8) for size in (left, expected))
            if left:
                stream.readinto(piece.numpy())
            _swap(piece, to if left else None, into, source if expected else None, group)
            left, expected = left - len(piece), expected - len(into)
            try:
                if failure is None and writing:
                    writing.write(into.numpy())
            except OSError as error:
                failure = error
        if writing and failure is None and writing.crc == int(about_coming[1]):
            writing.complete()
    if failure:
        raise failure


class _Writing:
    """A file that gets its name by :meth:`complete`; without that nothing is left of it."""

    def __init__(self, folder: Path, file: LocalFile):
        self._folder, self._file, self.crc = folder, file, 0
        self._temporary = folder / f".{file.name}.{os.getpid()}.part"
        self._stream = open(self._temporary, "wb")  # noqa: SIM115

    def write(self, data) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()

    def complete(self) -> LocalFile:
        self._stream.close()
        file = replace(self._file, crc=self.crc)
        os.replace(self._temporary, self._folder / file.name)
        return file

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._stream.close()
        finally:
            self._temporary.unlink(missing_ok=True)


def _swap(out: Tensor, to: int | None, into: Tensor, source: int | None, group: dist.ProcessGroup) -> None:
    works = [] if to is None else [dist.isend(out, to, group=group)]
    if source is not None:
        works.append(dist.irecv(into, source, group=group))
    for work in works:
        work.wait()
