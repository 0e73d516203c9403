"""Checkpoints on the disks of the nodes: frequent, because training waits only for a copy into the host's memory.

A thread of each rank writes what the rank holds into a folder of its node, and gives a copy to the same rank of the
next node, so that a lost node takes nothing with it. A run resumes from the newest iteration that is whole over all own
files and copies, under the same layout; otherwise from its newest checkpoint.
"""

import os
import secrets
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ext.checkpoints import local_files, local_state
from megatron_ext.checkpoints.checks import check_compatible, gathered
from megatron_ext.checkpoints.errors import cause
from megatron_ext.checkpoints.local_files import LocalFile
from megatron_ext.distributed import from_rank_zero, new_group
from megatron_ext.files import write_text


@dataclass(frozen=True)
class LocalPoint:
    """An iteration of which every rank's file is whole on some node.

    Attributes:
        files: by rank.
        holders: rank that reads each file, by the rank it belongs to.
    """

    iteration: int
    files: tuple[LocalFile, ...]
    holders: tuple[int, ...]

    def __str__(self) -> str:
        copies = sum(holder != rank for rank, holder in enumerate(self.holders))
        return f"the local checkpoint of iteration {self.iteration}" + (f" ({copies} files are copies)" * bool(copies))


class LocalCheckpoints:
    """The local checkpoints of a run. Every method is collective, but for :meth:`close`."""

    def __init__(self, folder: str, output: Path, layout: str, environment: Mapping[str, str] = os.environ):
        """
        Args:
            folder: on every node a disk of its own; may name environment variables ($TMPDIR).
            output: the run's output folder; several runs may share the disk. Local checkpoints count for as long as the
                folder exists: a random number in OUTPUT/local_run is part of the layout.
            layout: everything that a file's content depends on; a file of another layout does not count.
            environment: has LOCAL_RANK and LOCAL_WORLD_SIZE.
        """
        run = f"{output.name}-{zlib.crc32(str(output.resolve()).encode()):08x}"
        self.folder = Path(os.path.expandvars(folder)) / run
        self.folder.mkdir(parents=True, exist_ok=True)
        number = from_rank_zero(lambda: _number(output / "local_run"))
        self._layout = f"{zlib.crc32(f'{number} {layout}'.encode()):08x}"
        self._start = from_rank_zero(lambda: secrets.token_hex(4))
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._node_rank = int(environment.get("LOCAL_RANK", self._rank))
        self._node_size = int(environment.get("LOCAL_WORLD_SIZE", self._world))
        self._group = new_group(backend="gloo")
        self._staging: dict[int, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._writing: LocalFile | None = None

    def save(self, iteration: int, chunks: list[nn.Module], optimizer, state: dict) -> None:
        """Copy this rank's part of the run into memory; a thread writes it. Waits for an earlier one.

        Args:
            state: as for :meth:`Checkpointer.save`.
        """
        self.finish()
        position = iter(range(1 << 62))
        content = {
            "rank": local_state.rank_state(chunks, optimizer, lambda t: self._staged(next(position), t)),
            "state": state,
        }
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._writing = LocalFile(iteration, self._rank, self._start, self._layout)
        self._thread = threading.Thread(
            target=self._write, args=(self._writing, content), name="local checkpoint", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait for the files that are being written. Once all ranks have theirs, older ones are deleted."""
        if self._thread is None:
            return
        self.close()
        failed = torch.tensor([float(self._failure is not None)])
        dist.all_reduce(failed, group=self._group)
        if failed:
            if self._failure:
                print(
                    f"local checkpoint of iteration {self._writing.iteration} not written: {self._failure}", flush=True
                )
            self._failure = None
            return
        self.keep(lambda file: file.iteration >= self._writing.iteration)

    def close(self) -> None:
        """Wait for this rank's thread."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def keep(self, wanted: Callable[[LocalFile], bool]) -> None:
        """Delete the files on this node that are not ``wanted``."""
        for file in local_files.local_files(self.folder):
            if not wanted(file):
                (self.folder / file.name).unlink(missing_ok=True)

    def newest(self) -> LocalPoint | None:
        """The newest iteration that can be loaded. Reads the files of that iteration to check them."""
        mine = local_files.local_files(self.folder)
        everywhere = {file for files in gathered(mine) for file in files if file.layout == self._layout}
        points = {(file.iteration, file.start) for file in everywhere}
        for iteration, start in sorted(points, reverse=True):
            of_point = [f for f in everywhere if (f.iteration, f.start) == (iteration, start)]
            if {f.rank for f in of_point} != set(range(self._world)):
                continue
            checked = sorted(set(mine) & set(of_point))[self._node_rank :: self._node_size]
            whole = [f for f in checked if local_files.is_whole(self.folder, f)]
            if point := self._point(iteration, gathered(whole)):
                return point
        return None

    def _point(self, iteration: int, whole_by_rank: list[list[LocalFile]]) -> LocalPoint | None:
        files, holders = {}, {}
        for holder, files_of_holder in enumerate(whole_by_rank):
            for file in files_of_holder:
                own_node = holder // self._node_size == file.rank // self._node_size
                if file.rank not in files or own_node:
                    files[file.rank], holders[file.rank] = file, holder
        if len(files) < self._world:
            return None
        ranks = range(self._world)
        return LocalPoint(iteration, tuple(files[r] for r in ranks), tuple(holders[r] for r in ranks))

    def load(self, point: LocalPoint, chunks: list[nn.Module], optimizer, expected: dict) -> dict:
        """Load a point of :meth:`newest`, and return the ``state`` that was saved.

        Raises:
            UserError: it was saved by a run that does not match ``expected``.
        """
        for rank, (file, holder) in enumerate(zip(point.files, point.holders, strict=True)):
            if holder // self._node_size != rank // self._node_size:
                if self._rank == holder:
                    local_files.exchange(self.folder, self._group, outgoing=(rank, file))
                elif self._rank == rank:
                    local_files.exchange(self.folder, self._group, incoming=(holder, file))
        content = local_files.read(self.folder, point.files[self._rank])
        check_compatible(content["state"], expected, str(point))
        local_state.load_rank_state(chunks, optimizer, content["rank"])
        return content["state"]

    def _staged(self, position: int, tensor: Tensor) -> Tensor:
        """A copy in the host's memory, which is the same at every save: allocation takes longer than the copy."""
        buffer = self._staging.get(position)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._staging[position] = buffer
        return buffer.copy_(tensor, non_blocking=True)

    def _write(self, file: LocalFile, content: dict) -> None:
        """In a thread. Every rank takes part in the exchange, also one that could not write."""
        written = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            written = local_files.write(self.folder, file, content)
        except (OSError, RuntimeError) as error:
            self._failure = f"{self.folder}: {cause(error)}"
        if self._node_size == self._world:
            return
        to, source = ((self._rank + step) % self._world for step in (self._node_size, -self._node_size))
        coming = LocalFile(file.iteration, source, file.start, file.layout)
        try:
            local_files.exchange(self.folder, self._group, (to, written), (source, coming))
        except (OSError, RuntimeError) as error:
            self._failure = self._failure or f"{self.folder}: {cause(error)}"


def _number(file: Path) -> str:
    """The number in the file, which is made if need be."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, secrets.token_hex(8) + "\n")
    return file.read_text().strip()
