"""Where a run's checkpoints are, and how it resumes from the newest one that is intact."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext import distributed
from megatron_ext.checkpoints.checkpointer import Checkpointer
from megatron_ext.checkpoints.errors import DamageError
from megatron_ext.checkpoints.local import LocalCheckpoints, LocalPoint
from megatron_ext.checkpoints.replica import Replica
from megatron_ext.checkpoints.storage import is_url
from megatron_ext.config import Config
from megatron_ext.errors import UserError


def build_checkpointer(config: Config) -> Checkpointer:
    """The checkpoints of a run in its output folder, and local ones where the configuration asks for them."""
    output, checkpoint = Path(config.output), config.checkpoint
    local = LocalCheckpoints(checkpoint.local, output, _layout(config)) if checkpoint.local else None
    replica = Replica(checkpoint.replicate, checkpoint.keep) if checkpoint.replicate else None
    return Checkpointer(output / "checkpoints", checkpoint.keep, checkpoint.asynchronous, local, replica)


def fetched(load: str, output: str) -> Path:
    """``checkpoint.load`` as a path: the newest checkpoint of a URL is copied into OUTPUT/start. Collective.

    Raises:
        UserError: there is none at the URL.
    """
    if not is_url(load):
        return Path(load)
    path = Replica(load, keep=0).restore(Path(output) / "start")
    if path is None:
        raise UserError(f"{load}: no complete checkpoint")
    distributed.report(f"{path} is copied from {load}")
    return path


def load_intact(
    checkpoints: Checkpointer,
    point: Path | LocalPoint,
    on_damage: str,
    load: Callable[[Path | LocalPoint], dict],
) -> tuple[Path | LocalPoint, dict]:
    """Load ``point``; where it is damaged and ``on_damage`` is "older", the one before, and so on.

    Returns:
        What was loaded, and the result of ``load``.

    Raises:
        DamageError: a checkpoint is damaged, and there is no other to go on from.
    """
    while True:
        try:
            return point, load(point)
        except DamageError as error:
            if on_damage != "older" or not checkpoints.set_aside(point):
                raise
            fault = str(error).partition("; ")[0]
            damaged, point = point, checkpoints.resume_point()
            distributed.report(f"{fault}; {damaged.name} is renamed {damaged.name}.damaged, going back to {point}")


def _layout(config: Config) -> str:
    """All that the content of a local checkpoint depends on."""
    training = config.training
    return json.dumps(
        [
            asdict(config.model),
            asdict(config.plan),
            asdict(config.parallel),
            [training.precision, training.fp8, dist.get_world_size(), torch.device(torch.cuda.current_device()).type],
            [asdict(group) for group in config.optimizer.groups],
        ]
    )
