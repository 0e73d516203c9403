"""Where numbers that are not finite come from, after a step that was refused because of them.

The gradients of the step are sums over replicas already, which tell the parameter but not the rank. So the passes run
once more without any reduction, and every rank looks at what it computes itself.
"""

import math
import socket
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_ext.config import Config
from megatron_ext.training.prepare import StepInput
from megatron_ext.training.step import local_gradients
from megatron_ext.transformer.initialization import global_parameters

_MOST_NAMED = 3


def is_non_finite(loss: float, grad_norm: float) -> bool:
    """Whether a step has a number that is not finite. The same on every rank."""
    return not (math.isfinite(loss) and math.isfinite(grad_norm))


def locate(chunks: list, step: StepInput, config: Config) -> str:
    """Which ranks and parameters have numbers that are not finite, the same on every rank, in a few words. Collective.

    Takes about as long as a step. Gradients are lost; nothing else changes.

    Args:
        step: the input of the step that was refused, whose gradients are still there.
    """
    weights = _found((name, parameter) for name, parameter in _parameters(chunks))
    if weights:
        return f"weights are not finite: {weights}"
    reduced = _found(_gradients(chunks), with_ranks=False)
    layers: list[str] = []
    hooks = [
        module.register_forward_hook(_Check(f"layer {module.layer_number - 1}", layers))
        for chunk in chunks
        for module in unwrap_model(chunk).decoder.layers
    ]
    try:
        local_gradients(chunks, step, config)
    finally:
        for hook in hooks:
            hook.remove()
    outputs, own = _named(dict.fromkeys(layers, 1)), _found(_gradients(chunks))
    if outputs:
        return f"the forward pass, run again, gave numbers that are not finite: {outputs}"
    if own:
        return f"the backward pass, run again, gave gradients that are not finite: {own}"
    return (
        f"gradients that were not finite: {reduced or 'none, only the loss'}; the same passes, run again, gave finite "
        "ones: suspect a device or a message between ranks"
    )


class _Check:
    """A forward hook that notes a layer's name once if an output is not finite."""

    def __init__(self, name: str, found: list[str]):
        self._name, self._found = name, found

    def __call__(self, module: torch.nn.Module, inputs: tuple, output) -> None:
        if self._name not in self._found and any(not bool(t.isfinite().all()) for t in _tensors(output)):
            self._found.append(self._name)


def _tensors(output) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif hasattr(output, "__dict__"):
        yield from _tensors(list(vars(output).values()))


def _parameters(chunks: list) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for chunk in chunks:
        yield from global_parameters(unwrap_model(chunk))


def _gradients(chunks: list) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _parameters(chunks):
        if parameter.requires_grad:
            yield name, parameter.main_grad


def _found(tensors: Iterator[tuple[str, Tensor]], with_ranks: bool = True) -> str:
    """The tensors of all ranks that are not finite. Collective."""
    counts = [(name, (~tensor.detach().isfinite()).sum()) for name, tensor in tensors]
    numbers = torch.stack([count for _, count in counts]).tolist() if counts else []
    return _named({name: number for (name, _), number in zip(counts, numbers) if number}, with_ranks)


def _named(found: dict[str, int], with_ranks: bool = True) -> str:
    """What the ranks found, in a few words; empty: nothing. Collective."""
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (socket.gethostname(), found))
    if not with_ranks:
        names = {name: number for _, of_rank in ranks for name, number in of_rank.items()}
        return _shortened([f"{name} ({number} numbers)" for name, number in names.items()])
    lines = [
        f"rank {rank} ({host}): {_shortened(list(of_rank))}" for rank, (host, of_rank) in enumerate(ranks) if of_rank
    ]
    return _shortened(lines, "; ")


def _shortened(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return separator.join(names[:_MOST_NAMED]) + more
