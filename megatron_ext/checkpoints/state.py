"""A run's tensors as Megatron-Core's sharded state, in a form that does not depend on the layout.

Every layer's weights have their own keys, numbered over the whole model, so that pipeline and virtual pipeline stages
can change; every tensor records its place in the global tensor, so that the tensor-parallel size can change. The
optimizer is stored as its moments and float32 master weights in the shape of the weights, under the same keys with and
without the distributed optimizer, and the number of steps taken. Its hyperparameters belong to the configuration and
are not stored.
"""

import random
from collections.abc import Container

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.utils import unwrap_model
from torch import nn

_MASTER = "optimizer.state.param."
_MASTER_UNDISTRIBUTED = "optimizer.state.fp32_param."


def layout(chunks: list[nn.Module]) -> dict:
    """How the model is cut over processes, and the kind of device; random generators are restored only if all match."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": len(chunks),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
        "device": torch.device(torch.cuda.current_device()).type,
    }


def model_state(chunks: list[nn.Module]) -> dict:
    """Sharded state of the model chunks of this rank, one entry per chunk."""
    return {f"chunk{i}": unwrap_model(c).sharded_state_dict(metadata=_metadata()) for i, c in enumerate(chunks)}


def parameters(model: dict) -> list[ShardedTensor]:
    """The tensors in a :func:`model_state`; a tensor that is stored in parts is split into them."""
    built = [v.build() if isinstance(v, ShardedTensorFactory) else [v] for v in nested_values(model)]
    return [t for values in built for t in nested_values(values) if isinstance(t, ShardedTensor)]


def release_parts(model: dict) -> dict:
    """A :func:`model_state` with memory of its own for tensors that are stored in parts, such as gate and up; their
    parameters become empty. The writer copies parts that are views of a parameter, those of all layers at once."""

    def separate(value):
        if not isinstance(value, ShardedTensorFactory):
            return value
        parts = value.build()
        for part in nested_values(parts):
            part.data = part.data.clone()
        value.data.data = value.data.new_empty(0)
        return parts

    return dict_list_map_inplace(separate, model)


def load_model_state(chunks: list[nn.Module], loaded: dict) -> None:
    for i, chunk in enumerate(chunks):
        # The checkpointer verifies the keys before the load.
        unwrap_model(chunk).load_state_dict(loaded[f"chunk{i}"], strict=False)


def optimizer_state(optimizer, model: dict, stored: Container[str] | None = None) -> dict:
    """Sharded state of a Megatron-Core optimizer: only tensors are stored, everything else stays local.

    Args:
        optimizer: from ``get_megatron_optimizer``.
        model: the :func:`model_state`.
        stored: the keys in the checkpoint, to load; None to save. A checkpoint without master weights has float32
            weights, and the model's parameters take their place.

    Returns:
        The state; empty on a pipeline stage that is frozen whole.
    """
    optimizer = single_optimizer(optimizer)
    if not optimizer.get_parameters():
        return {}
    initialize(optimizer)
    state = optimizer.sharded_state_dict(model, is_loading=stored is not None, metadata=_metadata())
    weights = {v.key: v.data for v in nested_values(model) if isinstance(v, ShardedBase)}

    def storable(value):
        if not isinstance(value, ShardedBase):
            return value if isinstance(value, LocalNonpersistentObject) else LocalNonpersistentObject(value)
        value.key = value.key.replace(_MASTER_UNDISTRIBUTED, _MASTER, 1)
        if stored is not None and value.key.startswith(_MASTER) and value.key not in stored:
            return LocalNonpersistentObject(weights[value.key.removeprefix(_MASTER)])
        return value

    return dict_list_map_inplace(storable, state)


def load_optimizer_state(optimizer, loaded: dict, steps: int) -> None:
    """Give the optimizer its loaded :func:`optimizer_state`; the model's weights must be loaded before.

    Args:
        optimizer: the optimizer that the state belongs to.
        loaded: the state with its tensors filled.
        steps: steps taken at the time of the save.
    """
    optimizer = single_optimizer(optimizer)
    if not optimizer.get_parameters():
        return
    inner, body = optimizer.optimizer, loaded.get("optimizer", loaded)
    for group in body["param_groups"]:
        group["step"] = steps
    if "state" in body and any("step" in state for state in inner.state.values()):
        body["state"]["common_step"] = torch.tensor(float(steps), device=torch.cuda.current_device())
    moments = loaded.pop("param_state", None)
    optimizer.load_state_dict(loaded)
    if moments is not None:
        # torch's Adam counts steps in one tensor per parameter. The distributed optimizer would look for this tensor
        # among the loaded moments and fail, and would let all parameters share one tensor.
        counting = [state for state in inner.state.values() if state.pop("step", None) is not None]
        optimizer.load_parameter_state_from_fully_reshardable(moments)
        for state in counting:
            state["step"] = torch.tensor(float(steps), device=torch.cuda.current_device())


def single_optimizer(optimizer):
    """The one optimizer in the result of ``get_megatron_optimizer``, which may be a chain of one."""
    (single,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return single


def steps_taken(optimizer) -> int:
    """Updates that the optimizer has applied. Collective: a pipeline stage that is frozen whole counts none."""
    inner = single_optimizer(optimizer).optimizer
    holders = (*inner.state.values(), *inner.param_groups)
    counted = next((int(holder["step"]) for holder in holders if "step" in holder), 0)
    steps = torch.tensor(counted, device=torch.cuda.current_device())
    dist.all_reduce(steps, dist.ReduceOp.MAX)
    return int(steps)


def random_state() -> ShardedObject:
    """States of this rank's random generators: Python, NumPy, PyTorch, the device, Megatron-Core's tracker."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random", states, (dist.get_world_size(),), (dist.get_rank(),))


def load_random_state(states: dict) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def _metadata() -> dict:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        # Layers may have different parameters, so each layer has its own keys.
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def initialize(optimizer) -> None:
    """Create the initial state of an optimizer that has taken no step, so that it can be saved or loaded into.
    Megatron-Core's initialisation leaves out the step count of torch's Adam."""
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    if isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW):
        for state in optimizer.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0, device=torch.cuda.current_device()))
