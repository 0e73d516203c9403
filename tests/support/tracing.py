"""A training step on the meta device: Megatron-Core and the model as they are, operators without data."""

from collections import Counter
from contextlib import contextmanager, nullcontext
from unittest.mock import Mock

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext import config_file, cpu, distributed
from megatron_ext.config import Config
from megatron_ext.training.config_checks import validate

VIEWS = (
    "view",
    "transpose",
    "permute",
    "expand",
    "split",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
)
"""Operators that start no kernel."""


class Trace(TorchDispatchMode):
    """Counts the operators on the meta device, and fails where one of them would make the host wait."""

    def __init__(self):
        super().__init__()
        self.operators = Counter()
        self._numbers = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = function._overloadpacket.__name__
        inputs = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)]
        on_device = any(x.device.type == "meta" for x in inputs)
        if on_device:
            assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), f"{name} waits for the device"
            if name == "copy_" and arguments[0].device.type == "meta":
                # A number that is assigned to a slice is made on the host on a GPU, and on the device here.
                from_host = arguments[1].device.type == "cpu" or arguments[1].untyped_storage()._cdata in self._numbers
                assert not from_host, "copies from memory of the host that is not pinned"
            device = keywords.get("device")
            assert device is None or torch.device(device).type == "meta", f"{name} copies to the host"
            masks = [x for x in inputs if x.dtype == torch.bool]
            if name.startswith("index") and masks:  # a nonzero, except where a number is put, which fills
                fills = name.startswith("index_put") and arguments[2].dim() == 0
                assert fills, f"{name} by a mask waits for the device"
        result = function(*arguments, **keywords)
        if name == "scalar_tensor":
            self._numbers[result.untyped_storage()._cdata] = result  # kept, so that its address is not used again
        makes = any(isinstance(x, torch.Tensor) and x.device.type == "meta" for x in tree_leaves(result))
        if (on_device or makes) and not name.removeprefix("_").startswith(VIEWS):
            self.operators[name] += 1
        return result


@contextmanager
def world_on_meta(monkeypatch, *overrides: str):
    """Rank 0 of as many processes as the configuration's tensor parallelism wants, none of them real; gives the
    configuration."""
    config = config_file.load(Config, [], overrides)
    size, init, new_group = config.parallel.tensor, dist.init_process_group, dist.new_group
    validate(config, size)
    cpu.enter()
    monkeypatch.setattr(cpu, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "synchronize", _waits)
    monkeypatch.setattr(
        dist, "init_process_group", lambda *_, **__: init("fake", store=FakeStore(), rank=0, world_size=size)
    )
    monkeypatch.setattr(dist, "new_group", lambda ranks, **kw: new_group(ranks, **{**kw, "backend": "fake"}))
    # The one collective that torch has not got on meta.
    monkeypatch.setattr(param_and_grad_buffer, "_coalescing_manager", lambda *_, **__: nullcontext(Mock()))
    distributed.initialize(config)
    try:
        yield config
    finally:
        distributed.shut_down()


def _waits(*_) -> None:
    raise AssertionError("torch.cuda.synchronize waits for the device")
