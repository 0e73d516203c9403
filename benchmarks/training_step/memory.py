"""Peak memory of a step."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext import cpu


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes that a step allocates at once beyond weights, gradients and optimizer states."""
    if not cpu.available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with PeakStorage() as memory:
        step()
    return memory.peak


class PeakStorage(TorchDispatchMode):
    """Most bytes alive at once among the outputs of operators. For CPUs, whose allocator keeps no statistics; seeing
    every operator would be too slow on a GPU, whose allocator does.

    Attributes:
        live, peak: bytes alive now, and most so far.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        outputs = function(*arguments, **(keywords or {}))
        known = {id(x.untyped_storage()) for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self._known | known:
                self._known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return outputs

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
