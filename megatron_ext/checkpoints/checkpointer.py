"""Saving and loading a run, on top of Megatron-Core's ``dist_checkpointing``.

All ranks must see the same file system.
"""

import importlib.metadata
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megatron_ext import compat
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints import state as checkpoint_state
from megatron_ext.checkpoints import writer as checkpoint_writer
from megatron_ext.distributed import from_rank_zero, gather_weights
from megatron_ext.errors import UserError

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves a run's checkpoints in one folder and loads them.

    Every method is collective: all ranks call it in the same order.
    """

    def __init__(self, folder: Path, keep: int = 2, asynchronous: bool = False):
        """
        Args:
            folder: holds one ``iter_NNNNNNN`` per checkpoint.
            keep: number of newest checkpoints to keep; 0: all.
            asynchronous: write in a forked process while training continues. Call :meth:`poll` each iteration and
                :meth:`finish` at the end: a written checkpoint is completed only there.
        """
        self.folder = Path(folder)
        self.keep = keep
        self.asynchronous = asynchronous
        self._queue = AsyncCallsQueue()

    def save(self, iteration: int, model: list[nn.Module], optimizer, state: dict, release: bool = False) -> None:
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

        Raises:
            UserError: the checkpoint cannot be written (for an asynchronous save, possibly raised at a later call).
        """
        _require_plain(state, "state")
        self.finish()
        partial = from_rank_zero(lambda: checkpoint_folder.begin(self.folder, iteration))
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
        request, report = checkpoint_writer.prepare(
            sharded, partial, dist.get_rank(), parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        request.add_finalize_fn(lambda: self._complete(partial, description, report))
        if self.asynchronous:
            self._queue.schedule_async_request(request)
        else:
            self._reporting_failure(request.execute_sync)

    def poll(self) -> None:
        """Complete an asynchronous save once all ranks have written it; returns at once otherwise."""
        self._reporting_failure(self._queue.maybe_finalize_async_calls)

    def finish(self) -> None:
        """Wait for an asynchronous save and complete it."""
        self._reporting_failure(lambda: self._queue.maybe_finalize_async_calls(blocking=True))

    def newest(self) -> Path | None:
        """The newest complete checkpoint in the folder, the same on every rank; None: there is none.

        A checkpoint that was damaged after its completion still counts; :meth:`load` refuses it.
        """
        checkpoints = from_rank_zero(lambda: checkpoint_folder.checkpoints(self.folder))
        return checkpoints[-1] if checkpoints else None

    def load(self, path: Path, model: list[nn.Module], optimizer, expected: dict | None = None) -> dict:
        """Load a saved run under the same layout or another one.

        Every file is first read in full by one rank to verify its checksum, then by each rank that needs part of it.
        Random generators are restored under the same layout; under another one they stay as seeded, which is logged.

        Args:
            path: the checkpoint's folder.
            model: this rank's model chunks; any tensor, pipeline, virtual pipeline and data parallel size.
            optimizer: Megatron-Core's, distributed or not, however it was saved.
            expected: sections that the checkpoint's state must match, see :func:`check_compatible`.

        Returns:
            The ``state`` that was saved.

        Raises:
            UserError: a file of the checkpoint is missing or damaged, or its contents do not fit.
        """
        marker = _verified(path, expected)
        stored = _stored_shapes(path)
        if not any(key.startswith("optimizer.") for key in stored):
            raise UserError(
                f"{path}: has only weights, so a run cannot resume from it; move it out of the run's folder, and start "
                "from it with checkpoint.load"
            )
        sharded = {"model": checkpoint_state.model_state(model)}
        _check_parameters(path, sharded["model"], stored)
        sharded["optimizer"] = checkpoint_state.optimizer_state(optimizer, sharded["model"], stored)
        _check_moments(path, sharded["optimizer"], stored)
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

    def _complete(self, partial: Path, description: dict, report: checkpoint_writer.Report) -> None:
        """Make the written files a complete checkpoint; runs on every rank once all ranks have written."""
        reports: list = [None] * dist.get_world_size()
        dist.all_gather_object(reports, report.files)

        def publish() -> Path:
            files = {name: known for files in reports for name, known in files.items()}
            final = checkpoint_folder.complete(partial, description, files)
            checkpoint_folder.keep_newest(self.folder, self.keep)
            return final

        final = from_rank_zero(publish)
        if dist.get_rank() == 0:
            _log.info("%s is complete", final)

    def _reporting_failure(self, write: Callable) -> None:
        try:
            write()
        except CheckpointException as error:
            # Only rank 0 knows the cause.
            causes = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
            raise UserError(f"{self.folder}: the checkpoint could not be written ({causes or 'see rank 0'})") from None


def load_weights(path: Path, model: list[nn.Module], expected: dict | None = None) -> dict:
    """Load only the weights of a checkpoint, under any layout, to start a new run or to evaluate. Collective.

    An optimizer that was built before needs a call of its ``reload_model_params()`` afterwards.

    Args, Returns, Raises:
        As for :meth:`Checkpointer.load`.
    """
    marker = _verified(path, expected)
    stored = _stored_shapes(path)
    sharded = {"model": checkpoint_state.model_state(model)}
    _check_parameters(path, sharded["model"], stored)
    checkpoint_state.load_model_state(model, _read(path, sharded, stored)["model"])
    return marker["state"]


def read_state(path: Path) -> dict:
    """The ``state`` given to :meth:`Checkpointer.save`, without loading or checking anything else. Not collective.

    Raises:
        UserError: ``path`` is not a complete checkpoint.
    """
    return checkpoint_folder.read_marker(Path(path))["state"]


def check_compatible(state: dict, expected: dict, path: Path | str = "checkpoint") -> None:
    """Refuse a checkpoint whose state differs from what this run expects.

    Args:
        state: the checkpoint's state.
        expected: sections of the state as this run has them, such as
            ``{"model": {"hidden_size": 128}, "fingerprints": {"vocabulary": "5f0c"}}``. Other sections may
            differ; within a section a key that only one side has differs unless it is None.
        path: the checkpoint, for the message.

    Raises:
        UserError: names the first key that differs and both values.
    """
    difference = _difference(state, json.loads(json.dumps(expected)), "")
    if difference:
        key, saved, own = difference
        remedy = "; tools/convert_checkpoint.py can convert it" if key.startswith("plan.projections") else ""
        raise UserError(f"{path}: its {key} is {saved}, this run's is {own}{remedy}")


def _difference(saved: Any, expected: Any, key: str) -> tuple[str, Any, Any] | None:
    if not isinstance(expected, dict) and not isinstance(saved, dict):
        return None if saved == expected else (key, saved, expected)
    saved, expected = (value if isinstance(value, dict) else {} for value in (saved, expected))
    for name in dict.fromkeys((*expected, *(saved if key else ()))):
        difference = _difference(saved.get(name), expected.get(name), f"{key}.{name}" if key else name)
        if difference:
            return difference
    return None


def _verified(path: Path, expected: dict | None) -> dict:
    """The marker of a checkpoint whose files are all intact; the ranks share the reading."""
    path = Path(path)
    marker = from_rank_zero(lambda: checkpoint_folder.read_marker(path))
    if reason := compat.why_unreadable(marker["versions"]):
        raise UserError(f"{path}: {reason}")
    check_compatible(marker["state"], expected or {}, path)
    files = marker["files"]
    names = sorted(files, key=lambda name: (-files[name]["bytes"], name))[dist.get_rank() :: dist.get_world_size()]
    damaged = [line for lines in _gathered(checkpoint_folder.damage(path, files, names)) for line in lines]
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        remedy = from_rank_zero(lambda: checkpoint_folder.remedy(path))
        raise UserError(f"{sorted(damaged)[0]}{more}{remedy}")
    return marker


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every entry of the checkpoint by key, except for Megatron-Core's own entry."""
    stored = {v.key: tuple(v.global_shape) for v in load_sharded_metadata(str(path)).values()}
    stored.pop(compat.COMMON_STATE, None)
    return stored


def _check_parameters(path: Path, model: dict, stored: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose parameters are not exactly the model's."""
    # Tensors that allow a shape mismatch are padded to the vocabulary, differently under another tensor-parallel size.
    local = {
        t.key: None if t.allow_shape_mismatch else tuple(t.global_shape) for t in checkpoint_state.parameters(model)
    }
    expected = {key: shape for shapes in _gathered(local) for key, shape in shapes.items()}
    # Extra states are Transformer Engine's metadata beside its parameters.
    saved = {k: s for k, s in stored.items() if not k.startswith("optimizer.") and "_extra_state" not in k}
    saved.pop("random")
    for absent, fault in (
        (expected.keys() - saved, "lacks the parameter {}, which the model has"),
        (saved.keys() - expected, "has the parameter {}, which the model does not have"),
    ):
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise UserError(f"{path}: {fault.format(min(absent) + more)}")
    for key, shape in expected.items():
        if shape not in (None, saved[key]):
            raise UserError(f"{path}: its parameter {key} has the shape {list(saved[key])}, the model's {list(shape)}")


def _check_moments(path: Path, optimizer: dict, stored: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint in which parameters are frozen that this run trains."""
    keys = {tensor.key for tensor in checkpoint_state.parameters(optimizer)}
    absent = sorted(key for keys_of_rank in _gathered(keys) for key in keys_of_rank if key not in stored)
    if absent:
        name = re.sub(r"^optimizer\.state\.\w+\.", "", absent[0])
        raise UserError(
            f"{path}: {name} was frozen, and this run trains it; keep optimizer.groups, or start a run of another "
            "output with checkpoint.load"
        )


def _read(path: Path, sharded: dict, stored: dict[str, tuple[int, ...]]) -> dict:
    def if_stored(value):
        return value if not isinstance(value, ShardedObject) or value.key in stored else LocalNonpersistentObject(None)

    dict_list_map_inplace(if_stored, sharded["model"])
    return dist_checkpointing.load(sharded, str(path))


def _gathered(value) -> list:
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _require_plain(value, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{where}: key {key!r} is not a string")
            _require_plain(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _require_plain(inner, f"{where}[{i}]")
    elif value is not None and type(value) not in (str, bool, int, float):
        raise TypeError(f"{where} is a {type(value).__name__}, a checkpoint's state is plain JSON data")
