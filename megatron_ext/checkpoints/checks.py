"""What a checkpoint must be for a run to load it: intact, and made for the same model."""

import json
import re
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from megatron_ext import compat
from megatron_ext.checkpoints import folder as checkpoint_folder
from megatron_ext.checkpoints import state as checkpoint_state
from megatron_ext.checkpoints.errors import DamageError
from megatron_ext.distributed import from_rank_zero
from megatron_ext.errors import UserError


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


def verified(path: Path, expected: dict | None) -> dict:
    """The marker of a checkpoint whose files are all intact; the ranks share the reading."""
    path = Path(path)
    marker = from_rank_zero(lambda: checkpoint_folder.read_marker(path))
    if reason := compat.why_unreadable(marker["versions"]):
        raise UserError(f"{path}: {reason}")
    check_compatible(marker["state"], expected or {}, path)
    files = marker["files"]
    names = sorted(files, key=lambda name: (-files[name]["bytes"], name))[dist.get_rank() :: dist.get_world_size()]
    damaged = [line for lines in gathered(checkpoint_folder.damage(path, files, names)) for line in lines]
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        remedy = from_rank_zero(lambda: checkpoint_folder.remedy(path))
        raise DamageError(f"{sorted(damaged)[0]}{more}{remedy}")
    return marker


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every entry of the checkpoint by key, except for Megatron-Core's own entry."""
    stored = {v.key: tuple(v.global_shape) for v in load_sharded_metadata(str(path)).values()}
    stored.pop(compat.COMMON_STATE, None)
    return stored


def check_parameters(path: Path, model: dict, stored: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose parameters are not exactly the model's."""
    # Tensors that allow a shape mismatch are padded to the vocabulary, differently under another tensor-parallel size.
    local = {
        t.key: None if t.allow_shape_mismatch else tuple(t.global_shape) for t in checkpoint_state.parameters(model)
    }
    expected = {key: shape for shapes in gathered(local) for key, shape in shapes.items()}
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


def check_moments(path: Path, optimizer: dict, stored: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint in which parameters are frozen that this run trains."""
    keys = {tensor.key for tensor in checkpoint_state.parameters(optimizer)}
    absent = sorted(key for keys_of_rank in gathered(keys) for key in keys_of_rank if key not in stored)
    if absent:
        name = re.sub(r"^optimizer\.state\.\w+\.", "", absent[0])
        raise UserError(
            f"{path}: {name} was frozen, and this run trains it; keep optimizer.groups, or start a run of another "
            "output with checkpoint.load"
        )


def require_plain(value, where: str) -> None:
    """Refuse a state that JSON would change. ``where`` names it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{where}: key {key!r} is not a string")
            require_plain(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            require_plain(inner, f"{where}[{i}]")
    elif value is not None and type(value) not in (str, bool, int, float):
        raise TypeError(f"{where} is a {type(value).__name__}, a checkpoint's state is plain JSON data")


def gathered(value) -> list:
    """``value`` of every rank, by rank."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
