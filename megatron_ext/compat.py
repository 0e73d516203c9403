"""Differences between the supported versions of Megatron-Core, one function each.

Functions inspect a signature or an attribute, not the version number. Checked against 0.16.1, 0.17.1, 0.18.2 and
0.19.2. :mod:`megatron_ext.cpu` has the adaptations to CPUs, which all versions need.
"""

import inspect
import logging
from collections.abc import Mapping
from functools import partial
from importlib import metadata

from megatron.core import dist_checkpointing
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from packaging.version import Version
from torch import Tensor

COMMON_STATE = "common_state"
"""Key of the state that all ranks share, in checkpoints of 0.19 and later; older ones have a file ``common.pt``."""

_FIRST_WITH_COMMON_STATE = Version("0.19.0.dev0")


def mlp(submodules: MLPSubmodules):
    """The MLP in a layer's spec. From 0.18 on a layer calls this object, and warns about a ``ModuleSpec``."""
    if hasattr(MLP, "as_mlp_submodule"):
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def gradients_for_norm(optimizer) -> list[Tensor]:
    """This rank's part of the gradients in the norm; each gradient belongs to one rank. Renamed in 0.19."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()


def save_options() -> dict:
    """Options of ``dist_checkpointing.save`` that select Megatron-Core's own asynchronous save. From 0.17 on the
    default requires nvidia-resiliency-ext, which may not be installed."""
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def reads_common_state() -> bool:
    """Whether checkpoints with :data:`COMMON_STATE` can be read; ``common.pt`` is always readable."""
    return "common_strategy" not in inspect.signature(dist_checkpointing.save).parameters


def why_unreadable(versions: Mapping[str, str]) -> str | None:
    """Why the installed version cannot read a checkpoint with these ``versions`` in its marker; None if it can."""
    writer = versions["megatron-core"]
    if Version(writer) < _FIRST_WITH_COMMON_STATE or reads_common_state():
        return None
    return (
        f"written with megatron-core {writer}, which {metadata.version('megatron-core')} cannot read; "
        "install megatron-core>=0.19, which needs Python 3.12 or later"
    )


# Logged whenever a model is built, a checkpoint saved, or one of before 0.19 loaded. A user can do nothing about them.
_DEPRECATIONS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # from 0.19 on
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",  # from 0.17 on
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",  # from 0.19 on
}


def _silence_deprecations() -> None:
    for logger, message in _DEPRECATIONS.items():
        logging.getLogger(logger).addFilter(lambda record, message=message: not record.getMessage().startswith(message))


_silence_deprecations()
