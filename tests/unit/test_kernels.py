"""The memory-bound steps of a layer against float64: plain torch, and the Triton kernels in Triton's interpreter.

The same tests hold for either backend. On a machine with a GPU they run there; without one, a process of its own runs
them once more under ``TRITON_INTERPRET=1``.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.data.transfer import to_device
from megatron_ext.routing.permutation import Permutation
from megatron_ext.transformer.kernels import cpu_rotary, functions
from megatron_ext.transformer.kernels.backend import INTERPRETED, backend_of
from megatron_ext.transformer.rotary import Rotary, rotary_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""How far from float64, relative to the largest number."""

precisions = pytest.mark.parametrize("dtype", PRECISIONS, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def drawn_from_one_seed():
    torch.manual_seed(0)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)


def results(function, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of ``inputs`` for the gradients ``upstream`` of the outputs."""
    outputs = [output for output in function(*inputs) if output is not None]
    return [*outputs, *torch.autograd.grad(outputs, inputs, [g.to(o) for g, o in zip(upstream, outputs)])]


def assert_close_to_float64(function, plain, inputs: list[Tensor]) -> None:
    """``function`` and its gradients against those of ``plain`` in float64, for the same inputs."""
    dtype = inputs[0].dtype
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream = [torch.randn_like(output) for output in plain(*exact)]
    upstream = [g.to(dtype) for g in upstream]
    expected = results(plain, exact, upstream)
    for result, right in zip(results(function, inputs, upstream), expected, strict=True):
        assert result.dtype == dtype and result.shape == right.shape
        largest = float(right.abs().max()) if right.numel() else 0
        torch.testing.assert_close(result.double(), right, rtol=0, atol=PRECISIONS[dtype] * max(1.0, largest))


# ---- which backend


def test_triton_takes_gpus_and_meta_and_torch_takes_cpus():
    pytest.importorskip("triton")
    names = {
        device: backend_of(torch.empty(0, device=device)).__name__.rpartition(".")[2] for device in ("cpu", "meta")
    }
    assert names == {"cpu": "triton_backend" if INTERPRETED else "cpu_backend", "meta": "triton_backend"}


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="Triton is what runs here already")
def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr


# ---- norms


@precisions
@pytest.mark.parametrize("full, kv_only, h", [(5, None, 48), (7, 3, 40), (0, 4, 64), (4, 0, 7), (1, 1, 1)])
def test_the_input_norm(dtype, full, kv_only, h):
    def plain(full: Tensor, weight: Tensor, kv_only: Tensor | None = None) -> list[Tensor]:
        normed = [full, F.rms_norm(full, (h,), weight, 1e-5)]
        return normed if kv_only is None else [full, kv_only, normed[1], F.rms_norm(kv_only, (h,), None, 1e-5)]

    def ours(full: Tensor, weight: Tensor, kv_only: Tensor | None = None) -> tuple:
        return functions.input_norm(full, kv_only, weight, 1e-5)

    inputs = [draw(full, 1, h, dtype=dtype), draw(h, dtype=dtype)]
    assert_close_to_float64(ours, plain, inputs if kv_only is None else [*inputs, draw(kv_only, 1, h, dtype=dtype)])


@precisions
def test_the_norm_of_a_sum(dtype):
    def plain(residual: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        total = residual + x
        return [total, F.rms_norm(total, (20,), weight, 1e-5)]

    inputs = [draw(6, 1, 20, dtype=dtype), draw(6, 1, 20, dtype=dtype), draw(20, dtype=dtype)]
    assert_close_to_float64(lambda *given: functions.add_norm(*given, 1e-5), plain, inputs)


def test_rows_without_a_use_beside_their_norm_have_its_gradient_alone():
    x, weight = draw(3, 1, 8, dtype=torch.float64), draw(8, dtype=torch.float64)
    assert_close_to_float64(
        lambda x, w: [functions.rms_norm(x, w, 1e-5)], lambda x, w: [F.rms_norm(x, (8,), w, 1e-5)], [x, weight]
    )


def test_hidden_states_leave_the_input_norm_with_the_bits_with_which_they_came():
    full, kv_only, weight = (draw(*shape, dtype=torch.bfloat16) for shape in ((4, 1, 8), (2, 1, 8), (8,)))
    same_full, same_kv_only, *_ = functions.input_norm(full, kv_only, weight, 1e-5)
    assert torch.equal(same_full, full) and torch.equal(same_kv_only, kv_only)


# ---- the gated activation


@precisions
@pytest.mark.parametrize("rows, f", [(5, 12), (3, 1025), (1, 1), (0, 8)])
def test_the_gated_activation(dtype, rows, f):
    def plain(gate_up: Tensor) -> list[Tensor]:
        gate, up = gate_up.chunk(2, -1)
        return [F.silu(gate) * up]

    inputs = [draw(rows, 1, 2 * f, dtype=dtype)]
    assert_close_to_float64(lambda gate_up: [functions.swiglu(gate_up)], plain, inputs)


# ---- orders of rows


def permutation(index: list[int], inputs: list[int]) -> Permutation:
    """The map of ``index``; -1 stands at its end."""
    real = [i for i in index if i >= 0]
    repeated = len(set(real)) < len(real)
    return to_device(
        Permutation.of(np.array(real, dtype=int), inputs, repeated, fillers=len(index) - len(real)), DEVICE
    )


def plain_rows(rows: Tensor, index: list[int]) -> Tensor:
    """Row after row; -1: zeros."""
    return torch.stack([rows[i] if i >= 0 else torch.zeros_like(rows[0]) for i in index])


@precisions
@pytest.mark.parametrize(
    "index, inputs",
    [([4, 0, 2, 1, 3], 5), ([3, 1], 6), ([0, 5, 2, -1, -1, -1], 6), ([2, 0, 2, 2, 1, 0, -1], 4), ([0, -1], 1)],
    ids=["permutation", "some", "fillers", "repeated", "one"],
)
def test_rows_go_into_another_order_and_back(dtype, index, inputs):
    by, rows = permutation(index, [inputs]), draw(inputs, 1, 9, dtype=dtype)
    assert_close_to_float64(lambda x: [functions.permute(by, x)], lambda x: [plain_rows(x, index)], [rows])
    if by.inverse is not None:
        back = [index.index(i) if i in index else -1 for i in range(inputs)]
        ordered = draw(len(index), 1, 9, dtype=dtype)
        assert_close_to_float64(lambda x: [functions.unpermute(by, x)], lambda x: [plain_rows(x, back)], [ordered])


@pytest.mark.parametrize("start, stop", [(0, 64), (10, 40)], ids=["all", "some"])
def test_rows_in_long_runs_go_into_another_order_and_back(start, stop):
    index = [*range(40, stop), *range(start, 40)]
    by, rows = permutation(index, [64]), draw(64, 1, 3, dtype=torch.float64)
    assert by.runs
    assert_close_to_float64(lambda x: [functions.permute(by, x)], lambda x: [plain_rows(x, index)], [rows])
    back = [index.index(i) if i in index else -1 for i in range(64)]
    ordered = draw(len(index), 1, 3, dtype=torch.float64)
    assert_close_to_float64(lambda x: [functions.unpermute(by, x)], lambda x: [plain_rows(x, back)], [ordered])


# ---- queries, keys and values


@dataclass
class Case:
    """Arguments of :func:`~megatron_ext.transformer.kernels.functions.query_key_value`, orders as indices.

    Attributes:
        runs: the orders are also given as slices.
        few: the rows that plain torch counts as few.
    """

    full: int
    kv_only: int | None
    queries: list[int] | None = None
    keys: list[int] | None = None
    groups: int = 2
    q: int = 3
    d: int = 12
    runs: bool = False
    few: int = cpu_rotary.FEW


CASES = {
    "identity": Case(5, None),
    "identity of many": Case(5, None, few=0),
    "one row": Case(1, None, groups=1, q=1, d=2),
    "no row": Case(0, None),
    "no query": Case(0, 4, keys=[3, 1], groups=1, q=2, d=6),
    "order": Case(5, None, queries=[4, 2, 0, 1, 3], keys=[4, 2, 0, 1, 3]),
    "order of many": Case(5, None, queries=[4, 2, 0, 1], keys=[4, 2, 0, 1], few=0),
    "some rows": Case(6, 4, queries=[5, 2, 0], keys=[8, 5, 2, 7, 0, 6]),
    "fillers": Case(6, 4, queries=[5, 2, 0, -1, -1], keys=[8, 5, 9, 2, 7, 0, 6, -1], groups=3, q=1, d=8),
    "repeated": Case(4, 3, queries=[3, 0, 1, 2], keys=[4, 5, 3, 4, 5, 3, 0, 6, 4, 1, 2], q=1),
    "repeated, fillers": Case(4, 3, queries=[3, 0, 1, -1], keys=[4, 5, 3, 4, 5, 3, 0, 4, 1, -1, -1], d=10),
    "runs": Case(4, 6, queries=[2, 3, 0, 1], keys=[4, 5, 6, 2, 3, 7, 8, 9, 0, 1], runs=True),
    "runs of some": Case(4, 6, queries=[2, 3], keys=[5, 6, 2, 3], runs=True),
    "repeated runs": Case(4, 6, queries=[2, 3, 0, 1], keys=[4, 5, 6, 2, 3, 4, 5, 6, 2, 3, 0, 1], runs=True),
    "wide": Case(3, 2, queries=[1, 2, 0], keys=[3, 1, 2, 0, 4], groups=40, q=2, d=128),
}


def with_runs(by: Permutation | None, first: int) -> Permutation | None:
    """The map with each row as a run of its own, of a tensor of ``first`` rows and the next."""
    if by is None:
        return None
    return replace(by, runs=[(int(i >= first), i - first * (i >= first), 1) for i in by.index.tolist()])


def rotary_of(case: Case, dtype: torch.dtype) -> tuple[list[int], list[int], Rotary]:
    """Positions of queries and keys, a row's the same wherever it is used, and their angles."""
    of_row = torch.randperm(case.full + (case.kv_only or 0) + 1).tolist()
    positions = [
        [of_row[i] if i >= 0 else 0 for i in (range(case.full) if index is None else index)]
        for index in (case.queries, case.keys)
    ]
    precision = torch.promote_types(dtype, torch.float32)
    table = rotary_table(torch.rand(case.d // 2, dtype=precision, device=DEVICE), len(of_row))
    places = (torch.tensor(p, dtype=torch.int32, device=DEVICE) for p in positions)
    return *positions, Rotary(table, *places)


def plain_query_key_value(case: Case, table: Tensor, query_positions: list[int], key_positions: list[int]):
    """Row after row, head after head."""

    def turned(x: Tensor, positions: list[int]) -> Tensor:
        cosine, sine = table[:, positions][:, :, None, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)

    def ordered(x: Tensor, index: list[int] | None) -> Tensor:
        return x if index is None else plain_rows(x, index)

    def compute(mixed: Tensor, kv_only: Tensor | None = None) -> list[Tensor]:
        pairs = mixed[..., -2:, :] if kv_only is None else torch.cat([mixed[..., -2:, :], kv_only])
        query, pairs = ordered(mixed[..., :-2, :].flatten(2, 3), case.queries), ordered(pairs, case.keys)
        return [turned(query, query_positions), turned(pairs[..., 0, :], key_positions), pairs[..., 1, :]]

    return compute


@precisions
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_queries_keys_and_values(monkeypatch, dtype, case):
    monkeypatch.setattr(cpu_rotary, "FEW", case.few)
    query_positions, key_positions, rotary = rotary_of(case, dtype)
    inputs = [case.full] if case.kv_only is None else [case.full, case.kv_only]
    queries = None if case.queries is None else permutation(case.queries, [case.full])
    keys = None if case.keys is None else permutation(case.keys, inputs)
    if case.runs:
        queries, keys = with_runs(queries, case.full), with_runs(keys, case.full)
    mixed = draw(case.full, 1, case.groups, case.q + 2, case.d, dtype=dtype)
    given = [mixed] if case.kv_only is None else [mixed, draw(case.kv_only, 1, case.groups, 2, case.d, dtype=dtype)]

    def ours(mixed: Tensor, kv_only: Tensor | None = None) -> tuple:
        return functions.query_key_value(mixed, kv_only, queries, keys, rotary)

    assert_close_to_float64(
        ours, plain_query_key_value(case, rotary.table.double(), query_positions, key_positions), given
    )


def test_gradients_of_a_key_with_many_uses_are_rounded_once():
    uses = 64
    keys, rotary = permutation([1] * uses + [0], [1, 1]), Rotary(torch.ones(2, 1, 1, device=DEVICE), None, None)
    rotary.table[1] = 0
    rotary.query_positions = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    rotary.key_positions = torch.zeros(uses + 1, dtype=torch.int32, device=DEVICE)
    mixed, kv_only = draw(1, 1, 1, 3, 2, dtype=torch.bfloat16), draw(1, 1, 1, 2, 2, dtype=torch.bfloat16)
    outputs = functions.query_key_value(mixed, kv_only, None, keys, rotary)
    of_key, of_value = (torch.full_like(x, 1.0078125) for x in outputs[1:])
    (gradient,) = torch.autograd.grad(outputs, kv_only, [torch.zeros_like(outputs[0]), of_key, of_value])
    assert torch.equal(gradient, torch.full_like(gradient, uses * 1.0078125))
