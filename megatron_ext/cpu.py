"""Megatron-Core on CPUs, over gloo.

Megatron-Core trains correctly on CPUs, except that it hard-codes the CUDA device. :func:`enter` makes these names mean
the CPU, once per process and before any model is built; it must not be called on a machine with a GPU. Megatron-Core's
arithmetic, schedules and communication are unchanged. Checked against megatron-core 0.16.1 and 0.19.2.
"""

import functools
import logging

import torch

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "as_tensor")
_LIKE_FACTORIES = ("empty_like", "zeros_like", "ones_like", "full_like")

DEVICE = torch.device("cpu")
"""The device that ``cuda`` means. On ``meta`` a step can be traced: tensors have shapes but no data, and any operation
that would make the host wait for a device fails."""

_entered = False


def available() -> bool:
    """Whether this process should train on the CPU: no GPU is visible."""
    return _entered or not torch.cuda.is_available()


def enter() -> None:
    """Make ``cuda`` mean the CPU for this process. A second call does nothing.

    Raises:
        RuntimeError: a GPU is visible.
    """
    global _entered
    if _entered:
        return
    if torch.cuda.is_available():
        raise RuntimeError("megatron_ext.cpu is for machines without a GPU")
    _entered = True
    _redirect_device_calls()
    _redirect_factories()
    _redirect_random_state()


class _Stream:
    """The result of ``cuda.current_stream``: on the CPU there is nothing to wait for. From 0.19 on, every reduction of
    gradients uses it."""

    def wait_event(self, event) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass


def _redirect_device_calls() -> None:
    torch.cuda.current_device = lambda: DEVICE
    torch.cuda.current_stream = lambda *args, **kwargs: _Stream()
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.to(DEVICE)
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self.to(DEVICE)
    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def type_(self, *args, **kwargs):
        """The optimizers sort parameters by the name of their type and know only the CUDA names."""
        result = tensor_type(self, *args, **kwargs)
        return f"torch.cuda.{result.rpartition('.')[2]}" if isinstance(result, str) else result

    torch.Tensor.type = type_


def _redirect_factories() -> None:
    # On its first use `with torch.device(...)` records the functions that it affects. It must record the originals, not
    # their wrappers, or it would have no effect (transformers' from_pretrained builds models in such a block).
    with torch.device("cpu"):
        torch.empty(0)
    # Wrapping a few factories costs nothing elsewhere; a TorchFunctionMode would slow down every operation.
    for name in _FACTORIES + _LIKE_FACTORIES:
        setattr(torch, name, _redirected(getattr(torch, name)))


def _redirected(factory):
    @functools.wraps(factory)
    def call(*args, device=None, **kwargs):
        if device is not None and torch.device(device).type == "cuda":
            device = DEVICE
        return factory(*args, device=device, **kwargs)

    return call


def _redirect_random_state() -> None:
    from megatron.core.tensor_parallel import random as tensor_parallel_random

    def get_state(*args, **kwargs):
        return torch.get_rng_state()

    def set_state(state, *args, **kwargs):
        torch.set_rng_state(state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_state
    torch.cuda.manual_seed = torch.manual_seed
    tensor_parallel_random._get_cuda_rng_state = get_state
    tensor_parallel_random._set_cuda_rng_state = set_state
    # There is only one generator, so it is intended that every fork of the tracker changes the CPU's.
    logging.getLogger(tensor_parallel_random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )
