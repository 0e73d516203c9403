"""A GPU's path without a GPU: one operator per step of a layer, whose kernels compile for Hopper.

Widths are those of a 1B model.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from megatron_ext.data.transfer import to_device
from megatron_ext.routing.permutation import Permutation
from megatron_ext.transformer.kernels import functions, triton_backend
from megatron_ext.transformer.rotary import RotaryAngles

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


def random_rows(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)


def permutation(rows: int, inputs: list[int], repeated: bool = False, fillers: int = 0) -> Permutation:
    """The first rows in reverse order; more rows than there are repeat some."""
    index = np.arange(rows)[::-1] % sum(inputs)
    return Permutation.of(np.pad(index, (0, fillers), constant_values=-1), inputs, repeated)


def query_key_value(kv_only: int | None, queries: Permutation | None, keys: Permutation | None) -> tuple:
    """Arguments of the function of that name: 5 FULL rows, 8 groups of 4 queries, heads of 64."""
    positions = (np.zeros(5 if p is None else p.index.size, dtype=np.int32) for p in (queries, keys))
    pairs = None if kv_only is None else random_rows(kv_only, 1, 8, 2, 64)
    return random_rows(5, 1, 8, 6, 64), pairs, queries, keys, RotaryAngles(torch.ones(2, 4096, 32), *positions)


QUERY_KEY_VALUE = functions.query_key_value, ["query_key_value", "query_key_value_backward"]
STEPS = {
    "norm": (functions.rms_norm, ["norm", "norm_backward"], (random_rows(5, 1, 2048), random_rows(2048), 1e-5)),
    "input norm": (
        functions.input_norm,
        ["norm", "norm_backward"],
        (random_rows(5, 1, 2048), random_rows(3, 1, 2048), random_rows(2048), 1e-5),
    ),
    "norm of a sum": (
        functions.add_norm,
        ["add_norm", "norm_backward"],
        (random_rows(5, 1, 2048), random_rows(5, 1, 2048), random_rows(2048), 1e-5),
    ),
    "norm of queries and keys": (
        functions.head_norm,
        ["head_norm", "head_norm_backward"],
        (random_rows(5, 1, 8, 6, 64), random_rows(5, 64), 1e-5),
    ),
    "queries, keys, values": (*QUERY_KEY_VALUE, query_key_value(None, None, None)),
    "with fillers": (
        *QUERY_KEY_VALUE,
        query_key_value(3, permutation(3, [5], fillers=2), permutation(6, [5, 3], fillers=2)),
    ),
    "with repeated keys": (
        *QUERY_KEY_VALUE,
        query_key_value(3, permutation(5, [5]), permutation(16, [5, 3], repeated=True)),
    ),
    "permute": (functions.permute, ["gather", "gather"], (permutation(3, [5]), random_rows(5, 1, 2048))),
    "permute some twice": (
        functions.permute,
        ["gather", "sum_rows"],
        (permutation(9, [5], repeated=True), random_rows(5, 1, 2048)),
    ),
    "unpermute": (functions.unpermute, ["gather", "gather"], (permutation(3, [5]), random_rows(3, 1, 2048))),
    "gated activation": (functions.swiglu, ["swiglu", "swiglu_backward"], (random_rows(5, 1, 16384),)),
}
"""Function, operators of the forward and backward passes, and arguments on the host of each step."""

steps = pytest.mark.parametrize("function, operators, arguments", STEPS.values(), ids=STEPS)


def on(device: str, arguments: tuple) -> list:
    return [x.detach().to(device).requires_grad_() if _wants_gradient(x) else to_device(x, device) for x in arguments]


def results(function, arguments: list) -> list[Tensor]:
    """Outputs, and gradients of the arguments that require one."""
    outputs = function(*arguments)
    outputs = [output for output in (outputs if isinstance(outputs, tuple) else [outputs]) if output is not None]
    upstream = [torch.empty_like(output) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x for x in arguments if _wants_gradient(x)], upstream)]


def _wants_gradient(x) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


class Operators(TorchDispatchMode):
    """The names of operators that compute."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._overloadpacket.__name__
        if not function.is_view and name != "empty_like":
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


@steps
def test_a_step_is_one_operator_forward_and_one_backward(function, operators, arguments):
    on_device = on("meta", arguments)
    with Operators() as dispatched:
        on_meta = results(function, on_device)
    assert dispatched.names == operators
    on_cpu = results(function, on("cpu", arguments))
    assert [(x.shape, x.dtype) for x in on_meta] == [(x.shape, x.dtype) for x in on_cpu]


@steps
def test_its_kernels_compile_for_hopper(monkeypatch, tmp_path, function, operators, arguments):
    names = []

    def compiled(kernel, grid, *tensors_and_sizes, **options):
        compile_for_hopper(kernel, tensors_and_sizes, options)
        names.append(kernel.fn.__name__)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_backend, "_launch", compiled)
    results(function, on("meta", arguments))
    assert names == operators


def compile_for_hopper(kernel, arguments: tuple, options: dict) -> None:
    """Compile a kernel as a launch on an H100 would."""
    warps = options.pop("num_warps")
    signature, attributes = {}, {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments)):
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr" if value is None else "i32"
    constants = {name: None for name, kind in signature.items() if kind == "constexpr"} | options
    signature |= dict.fromkeys(options, "constexpr")
    source = ASTSource(kernel, signature, constants, attributes)
    assert compile(source, target=HOPPER, options={"num_warps": warps}).asm["cubin"]
