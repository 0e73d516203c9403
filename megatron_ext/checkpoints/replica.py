"""A second place for complete checkpoints (``checkpoint.replicate``), filled while training goes on.

A thread of each rank copies a share of the files, and checks them against their checksums on the way. Once all ranks
have theirs, the marker makes the copy a checkpoint. A run whose own folder has no checkpoint gets one back from here.
"""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints.checks import gathered
from megatron_ext.checkpoints.errors import DamageError, WriteError, cause
from megatron_ext.checkpoints.folder import MARKER
from megatron_ext.checkpoints.storage import copy, files_of, storage
from megatron_ext.distributed import from_rank_zero, report
from megatron_ext.errors import UserError


class Replica:
    """Copies of a run's checkpoints at a path or URL. Every method is collective.

    A failed copy is reported, not raised.
    """

    def __init__(self, place: str, keep: int):
        """
        Args:
            keep: number of newest copies to keep; 0: all.

        Raises:
            UserError: the URL is unknown.
        """
        self.place, self._keep = place, keep
        self._storage = storage(place)
        self.source: Path | None = None  # being copied
        self._waiting: Path | None = None
        self._thread: threading.Thread | None = None

    def offer(self, checkpoint: Path) -> None:
        """Copy a checkpoint in the background; while an earlier one is being copied, the newest offer waits."""
        if self.source:
            self._waiting = checkpoint
            return
        self.source, self._waiting, self._failure = checkpoint, None, None
        iteration = checkpoint_folder.iteration_of(checkpoint)
        try:
            self._marker, self._target = from_rank_zero(lambda: self._begin(checkpoint, iteration))
        except WriteError as error:
            report(f"{checkpoint.name} is not copied: {error}")
            self.source = None
            return
        self._thread = threading.Thread(target=self._copy, args=(checkpoint,), daemon=True)
        self._thread.start()

    def offer_newer(self, checkpoint: Path | None) -> None:
        """Copy a checkpoint if it is newer than every copy."""
        if checkpoint is None:
            return
        try:
            newest = self.newest()
        except UserError as error:
            report(f"{checkpoint.name} is not copied: {error}")
            return
        if newest is None or newest < checkpoint_folder.iteration_of(checkpoint):
            self.offer(checkpoint)

    def poll(self, wait: bool = False) -> None:
        """Complete a copy once all ranks have their files; without ``wait`` it returns at once if one has not."""
        if not self.source:
            return
        if wait:
            self._thread.join()
        alive = torch.tensor([float(self._thread.is_alive())], device=torch.cuda.current_device())
        dist.all_reduce(alive)
        if alive.item():
            return
        source, waiting = self.source, self._waiting
        self.source = None
        self._complete(source)
        if waiting:
            self.offer(waiting)

    def finish(self) -> None:
        """Wait for what is being copied."""
        if self.source:
            report(f"waiting for the copy of {self.source.name} in {self.place}")
        while self.source:
            self.poll(wait=True)

    def newest(self) -> int | None:
        """Iteration of the newest copy; None: there is none."""
        iterations = from_rank_zero(lambda: self._read(self._storage.iterations))
        return iterations[-1] if iterations else None

    def restore(self, folder: Path) -> Path | None:
        """Copy the newest checkpoint from here into ``folder``; None: there is none here.

        Raises:
            DamageError: a file is not what was written.
            WriteError: the folder cannot be written.
        """
        iteration = self.newest()
        if iteration is None:
            return None
        marker = from_rank_zero(lambda: self._read(self._read_marker, iteration))
        partial = from_rank_zero(lambda: checkpoint_folder.begin(folder, iteration))
        failure: Exception | None = None
        try:
            for name, known in _share(marker):
                with self._storage.reader(iteration, name) as source, open(partial / name, "wb") as target:
                    copied = copy(source, target)
                    os.fsync(target.fileno())
                if copied != known:
                    copied = f"{self.place}/checkpoints/iter_{iteration:07d}/{name}"
                    raise DamageError(f"{copied}: damaged, its checksum is wrong")
        except DamageError as error:
            failure = error
        except OSError as error:
            failure = WriteError(f"{error.filename or partial}: {cause(error)}")
        failures = [error for error in gathered(failure) if error]
        if failures:
            shutil.rmtree(partial, ignore_errors=True)
            raise failures[0]
        return from_rank_zero(lambda: checkpoint_folder.publish(partial, iteration, marker))

    def _read(self, function: Callable, *arguments):
        try:
            return function(*arguments)
        except Exception as error:  # of any file system that fsspec knows
            raise UserError(f"{self.place}: cannot be read ({cause(error)})") from None

    def _begin(self, checkpoint: Path, iteration: int) -> tuple[bytes, str]:
        try:
            return (checkpoint / MARKER).read_bytes(), self._storage.begin(iteration)
        except Exception as error:  # of any file system that fsspec knows
            raise WriteError(f"{self.place}: {cause(error)}") from None

    def _read_marker(self, iteration: int) -> bytes:
        with self._storage.reader(iteration, MARKER) as stream:
            return stream.read()

    def _copy(self, checkpoint: Path) -> None:
        """In a thread."""
        try:
            for name, known in _share(self._marker):
                with open(checkpoint / name, "rb") as source, self._storage.writer(self._target, name) as target:
                    copied = copy(source, target)
                if copied != known:
                    self._failure = f"{checkpoint / name}: damaged, its checksum is wrong"
                    return
        except Exception as error:  # of any file system that fsspec knows
            self._failure = f"{self.place}: {cause(error)}"

    def _complete(self, source: Path) -> None:
        failures = [failure for failure in gathered(self._failure) if failure]

        def complete() -> str | None:
            try:
                if failures:
                    self._storage.discard(self._target)
                    return failures[0]
                self._storage.complete(self._target, checkpoint_folder.iteration_of(source), self._marker)
                self._storage.keep_newest(self._keep)
            except Exception as error:  # of any file system that fsspec knows
                return f"{self.place}: {cause(error)}"
            return None

        failure = from_rank_zero(complete)
        report(f"{source.name} is not copied: {failure}" if failure else f"{source.name} is copied to {self.place}")


def _share(marker: bytes) -> list[tuple[str, dict]]:
    """The files that this rank copies, with their fingerprints."""
    files = sorted(files_of(marker).items(), key=lambda item: (-item[1]["bytes"], item[0]))
    return files[dist.get_rank() :: dist.get_world_size()]
