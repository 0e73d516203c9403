"""What one rank holds of a run, without other ranks' parts, and only for the same layout.

With the distributed optimizer every rank owns a part of the float32 weights and moments, from which the model's weights
follow. Without it replicas hold the same, and the first of them stores it for all.

Uses one private method of Megatron-Core's optimizers; checked against 0.16.1 and 0.19.2.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_ext.checkpoints import state as checkpoint_state


def rank_state(chunks: list[nn.Module], optimizer, to_host: Callable[[Tensor], Tensor]) -> dict:
    """This rank's part of a run. Collective.

    Args:
        to_host: copies a tensor.
    """
    optimizer = checkpoint_state.single_optimizer(optimizer)
    return {
        "random": checkpoint_state.random_state().data,
        "steps": checkpoint_state.steps_taken(optimizer),
        "tensors": [to_host(t) for t in _tensors(chunks, optimizer)] if _stores_tensors(optimizer) else [],
        "other": [_other(chunk, to_host) for chunk in chunks],
    }


def load_rank_state(chunks: list[nn.Module], optimizer, saved: dict) -> None:
    """Give every rank the state that :func:`rank_state` returned on it. Collective."""
    optimizer = checkpoint_state.single_optimizer(optimizer)
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    first = dist.get_global_rank(replicas, 0)
    with torch.no_grad():
        stored = iter(saved["tensors"])
        for tensor in _tensors(chunks, optimizer):
            if _stores_tensors(optimizer):
                tensor.copy_(next(stored))
            if not _is_distributed(optimizer):
                dist.broadcast(tensor, first, replicas)
    for group in optimizer.optimizer.param_groups if optimizer.get_parameters() else ():
        if "step" in group:
            group["step"] = saved["steps"]
    for chunk, other in zip(chunks, saved["other"], strict=True):
        unwrap_model(chunk).load_state_dict(other, strict=False)
    if _is_distributed(optimizer):
        for chunk in chunks:
            _broadcast_frozen(chunk, first, replicas)
    if hasattr(optimizer, "_copy_main_params_to_model_params") and optimizer.get_parameters():
        optimizer._copy_main_params_to_model_params()
    for chunk in chunks:
        if _is_distributed(optimizer):
            chunk.start_param_sync(force_sync=True)
    checkpoint_state.load_random_state(saved["random"])


def _is_distributed(optimizer) -> bool:
    return bool(optimizer.config.use_distributed_optimizer)


def _stores_tensors(optimizer) -> bool:
    return _is_distributed(optimizer) or parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def _tensors(chunks: list[nn.Module], optimizer) -> Iterator[Tensor]:
    """The optimizer's float32 weights, moments and step counts, and frozen weights where this rank stores them."""
    if optimizer.get_parameters():
        checkpoint_state.initialize(optimizer)
        inner = optimizer.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                yield parameter.data
                state = inner.state[parameter]
                yield from (state[name] for name in sorted(state) if isinstance(state[name], Tensor))
    if not _is_distributed(optimizer) or parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        for chunk in chunks:
            yield from (p.data for p in chunk.parameters() if not p.requires_grad)


def _broadcast_frozen(chunk: nn.Module, first: int, replicas: dist.ProcessGroup) -> None:
    for parameter in chunk.parameters():
        if not parameter.requires_grad:
            dist.broadcast(parameter.data, first, replicas)


def _other(chunk: nn.Module, to_host: Callable[[Tensor], Tensor]) -> dict:
    """What a chunk's state has besides parameters, such as the scales of FP8."""
    module = unwrap_model(chunk)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = {k: v for k, v in module.state_dict().items() if k not in parameters and v is not None}
    return {k: to_host(v) if isinstance(v, Tensor) else v for k, v in state.items()}
