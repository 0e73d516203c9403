"""Saving and loading a run, on top of Megatron-Core's ``dist_checkpointing``.

All ranks must see the same file system.
"""

import importlib.metadata
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megatron_ext.checkpoints import checks
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints import state as checkpoint_state
from megatron_ext.checkpoints import writer as checkpoint_writer
from megatron_ext.checkpoints.errors import DamageError, WriteError, cause, writing
from megatron_ext.checkpoints.local import LocalCheckpoints, LocalPoint
from megatron_ext.checkpoints.replica import Replica
from megatron_ext.distributed import from_rank_zero, gather_weights, report
from megatron_ext.errors import UserError

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves a run's checkpoints in one folder and loads them.

    Every method is collective: all ranks call it in the same order.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        asynchronous: bool = False,
        local: LocalCheckpoints | None = None,
        replica: Replica | None = None,
    ):
        """
        Args:
            folder: holds one ``iter_NNNNNNN`` per checkpoint.
            keep: number of newest checkpoints to keep; 0: all.
            asynchronous: write in a forked process while training continues. Call :meth:`poll` each iteration and
                :meth:`finish` at the end: a written checkpoint is completed only there.
            local: checkpoints on the disks of the nodes, which a run may resume from too.
            replica: a second place that complete checkpoints are copied to.
        """
        self.local, self.replica = local, replica
        self.folder = Path(folder)
        self.keep = keep
        self.asynchronous = asynchronous
        self._queue = AsyncCallsQueue()

    def save(self, iteration: int, model: list[nn.Module], optimizer, state: dict, release: bool = False) -> bool:
        """Save everything that a run needs to resume bit for bit after ``iteration``.

        Waits for an earlier save that is still being written. Needs host memory for a copy of the tensors that this
        rank stores, and with the distributed optimizer also for its replicas' share of the optimizer's state, which is
        gathered.

        Args:
            iteration: iterations done.
            model: this rank's model chunks, wrapped for data parallelism or not.
            optimizer: Megatron-Core's; None to save only weights, from which a run can start but not resume.
            state: the rest of the run's state, the same on every rank, as plain JSON data. :meth:`load` returns it, and
                :func:`read_state` reads it without loading.
            release: the model is not used again, and memory need not hold any of it twice.

        Returns:
            Whether the checkpoint is complete: not yet for an asynchronous save.

        Raises:
            WriteError: the checkpoint cannot be written (for an asynchronous save, possibly raised at a later call). It
                is raised on every rank, nothing of the checkpoint is left, and training may go on.
        """
        checks.require_plain(state, "state")
        self.finish()
        partial = from_rank_zero(lambda: self._begin(iteration))
        gather_weights(model)
        sharded = {"model": checkpoint_state.model_state(model)}
        if release:
            sharded["model"] = checkpoint_state.release_parts(sharded["model"])
        sharded["random"] = checkpoint_state.random_state()
        if optimizer is not None:
            sharded["optimizer"] = checkpoint_state.optimizer_state(optimizer, sharded["model"])
            sharded["optimizer_steps"] = checkpoint_state.steps_taken(optimizer)
        description = {
            "iteration": iteration,
            "versions": {name: importlib.metadata.version(name) for name in ("megatron-core", "torch")},
            "layout": checkpoint_state.layout(model),
            "state": state,
        }
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        try:
            request, written, describe = checkpoint_writer.prepare(sharded, partial, replicas)
        except CheckpointException as error:  # on every rank
            raise WriteError(f"{self.folder}: the checkpoint could not be written ({cause(error)})") from None
        request.add_finalize_fn(lambda: self._complete(partial, description, written, describe))
        if self.asynchronous:
            self._queue.schedule_async_request(request)
        else:
            request.execute_sync()
        return not self.asynchronous

    def poll(self) -> bool:
        """Complete an asynchronous save once all ranks have written it; returns at once otherwise.

        Returns:
            Whether a checkpoint became complete.

        Raises:
            WriteError: as for :meth:`save`.
        """
        if self.replica:
            self.replica.poll()
        return bool(self._queue.maybe_finalize_async_calls())

    def finish(self) -> bool:
        """Wait for an asynchronous save and complete it; returns and raises what :meth:`poll` does."""
        return bool(self._queue.maybe_finalize_async_calls(blocking=True))

    def newest(self) -> Path | None:
        """The newest complete checkpoint in the folder, the same on every rank; None: there is none.

        A checkpoint that was damaged after its completion still counts; :meth:`load` refuses it.
        """
        checkpoints = from_rank_zero(lambda: checkpoint_folder.checkpoints(self.folder))
        return checkpoints[-1] if checkpoints else None

    def resume_point(self) -> Path | LocalPoint | None:
        """What a run resumes from: the newest checkpoint, of the second place if there is none here, or a newer local
        one; None: there is no checkpoint."""
        newest = self.newest() or self._restored()
        local = self.local.newest() if self.local else None
        if local and (newest is None or local.iteration > checkpoint_folder.iteration_of(newest)):
            return local
        return newest

    def _restored(self) -> Path | None:
        """The newest checkpoint of the second place, copied back."""
        path = self.replica.restore(self.folder) if self.replica else None
        if path:
            report(f"{path} is copied back from checkpoint.replicate, {self.replica.place}")
        return path

    def forget_after(self, iteration: int) -> None:
        """Delete local checkpoints of later iterations: the run goes on from this one, maybe otherwise than before."""
        if self.local:
            self.local.keep(lambda file: file.iteration <= iteration)

    def set_aside(self, path: Path) -> Path | None:
        """Rename the damaged checkpoint ``path`` to ``iter_NNNNNNN.damaged``, if there is another to go on from.

        Returns:
            The newest other one: the next older, or a copy from the second place; None: there is none, and nothing was
            renamed.
        """
        iteration = checkpoint_folder.iteration_of
        older = from_rank_zero(lambda: checkpoint_folder.older_than(path))
        copied = self.replica.newest() if self.replica else None
        from_copy = copied is not None and (not older or copied > iteration(older))
        if not (older or from_copy):
            return None
        damaged = from_rank_zero(lambda: path.rename(checkpoint_folder.damaged_name(path)))
        if not from_copy:
            return older
        try:
            return self._restored()
        except DamageError as error:
            report(str(error))
            if not older:
                from_rank_zero(lambda: damaged.rename(path))
            return older

    def load(self, path: Path | LocalPoint, model: list[nn.Module], optimizer, expected: dict | None = None) -> dict:
        """Load a saved run under the same layout or another one.

        Every file is first read in full by one rank to verify its checksum, then by each rank that needs part of it.
        Random generators are restored under the same layout; under another one they stay as seeded, which is logged.

        Args:
            path: the checkpoint's folder, or a local checkpoint of the same layout.
            model: this rank's model chunks; any tensor, pipeline, virtual pipeline and data parallel size.
            optimizer: Megatron-Core's, distributed or not, however it was saved.
            expected: sections that the checkpoint's state must match, see :func:`check_compatible`.

        Returns:
            The ``state`` that was saved.

        Raises:
            DamageError: a file of the checkpoint is missing or damaged.
            UserError: the contents of the checkpoint do not fit.
        """
        if isinstance(path, LocalPoint):
            return self.local.load(path, model, optimizer, expected or {})
        marker = checks.verified(path, expected)
        stored = checks.stored_shapes(path)
        if not any(key.startswith("optimizer.") for key in stored):
            raise UserError(
                f"{path}: has only weights, so a run cannot resume from it; move it out of the run's folder, and start "
                "from it with checkpoint.load"
            )
        sharded = {"model": checkpoint_state.model_state(model)}
        checks.check_parameters(path, sharded["model"], stored)
        sharded["optimizer"] = checkpoint_state.optimizer_state(optimizer, sharded["model"], stored)
        checks.check_moments(path, sharded["optimizer"], stored)
        same_layout = marker["layout"] == checkpoint_state.layout(model)
        if same_layout:
            sharded["random"] = checkpoint_state.random_state()

        loaded = _read(path, sharded, stored)
        checkpoint_state.load_model_state(model, loaded["model"])
        checkpoint_state.load_optimizer_state(optimizer, loaded["optimizer"], loaded["optimizer_steps"])
        if same_layout:
            checkpoint_state.load_random_state(loaded["random"])
        elif dist.get_rank() == 0:
            _log.warning(
                "%s was saved under another layout (%s): the random generators restart from the seed",
                path,
                ", ".join(f"{k} {v}" for k, v in marker["layout"].items()),
            )
        return marker["state"]

    def _begin(self, iteration: int) -> Path:
        with writing(self.folder):
            return checkpoint_folder.begin(self.folder, iteration)

    def _complete(
        self, partial: Path, description: dict, written: checkpoint_writer.Report, describe: Callable
    ) -> None:
        """Make the written files a complete checkpoint; runs on every rank once all ranks have written."""
        spared = self.replica.source if self.replica else None
        of_ranks: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(written.take(), of_ranks)

        def publish() -> Path:
            try:
                _require_written(of_ranks)
                with writing(partial):
                    describe([w.results for w in of_ranks])
                    files = {name: known for w in of_ranks for name, known in w.files.items()}
                    final = checkpoint_folder.complete(partial, description, files)
            except WriteError as error:
                shutil.rmtree(partial, ignore_errors=True)  # room for the next one
                name = f"iter_{description['iteration']:07d}"
                raise WriteError(str(error).replace(partial.name, name)) from None
            try:
                checkpoint_folder.keep_newest(self.folder, self.keep, spared)
            except OSError as error:
                _log.warning("%s: an older checkpoint could not be deleted (%s)", self.folder, cause(error))
            return final

        final = from_rank_zero(publish)
        if dist.get_rank() == 0:
            _log.info("%s is complete", final)
        if self.replica:
            self.replica.offer(final)


def _require_written(of_ranks: list[checkpoint_writer.Written]) -> None:
    failures = [f"{w.failure} (rank {rank})" for rank, w in enumerate(of_ranks) if w.failure]
    if failures:
        more = f" and on {len(failures) - 1} more ranks" if len(failures) > 1 else ""
        raise WriteError(f"{failures[0]}{more}")


def load_weights(path: Path, model: list[nn.Module], expected: dict | None = None) -> dict:
    """Load only the weights of a checkpoint, under any layout, to start a new run or to evaluate. Collective.

    An optimizer that was built before needs a call of its ``reload_model_params()`` afterwards.

    Args, Returns, Raises:
        As for :meth:`Checkpointer.load`.
    """
    marker = checks.verified(path, expected)
    stored = checks.stored_shapes(path)
    sharded = {"model": checkpoint_state.model_state(model)}
    checks.check_parameters(path, sharded["model"], stored)
    checkpoint_state.load_model_state(model, _read(path, sharded, stored)["model"])
    return marker["state"]


def read_state(path: Path) -> dict:
    """The ``state`` given to :meth:`Checkpointer.save`, without loading or checking anything else. Not collective.

    Raises:
        UserError: ``path`` is not a complete checkpoint.
    """
    return checkpoint_folder.read_marker(Path(path))["state"]


def _read(path: Path, sharded: dict, stored: dict[str, tuple[int, ...]]) -> dict:
    def if_stored(value):
        return value if not isinstance(value, ShardedObject) or value.key in stored else LocalNonpersistentObject(None)

    dict_list_map_inplace(if_stored, sharded["model"])
    return dist_checkpointing.load(sharded, str(path))
