"""Kernels against the package's plain mathematics in float64: those for CPUs, and Triton's in its interpreter.

Both backends pass the same tests. On a machine with a GPU they run there; without one, a second process runs them under
``TRITON_INTERPRET=1``.
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
from megatron_ext.transformer.activation import swiglu
from megatron_ext.transformer.kernels import INTERPRETED, cpu_rotary, functions
from megatron_ext.transformer.kernels.backend import backend_of
from megatron_ext.transformer.norm import rms_norm
from megatron_ext.transformer.permute import permute, unpermute
from megatron_ext.transformer.rotary import RotaryAngles, apply_rotary, rotary_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISIONS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""How far from float64, relative to the largest number."""

precisions = pytest.mark.parametrize("dtype", PRECISIONS, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def random_rows(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)


def results(function, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of ``inputs`` given the gradients ``upstream`` of the outputs."""
    outputs = [output for output in function(*inputs) if output is not None]
    return [*outputs, *torch.autograd.grad(outputs, inputs, [g.to(o) for g, o in zip(upstream, outputs)])]


def assert_close_to_float64(function, plain, inputs: list[Tensor]) -> None:
    """``function`` and its gradients equal ``plain`` and its gradients in float64, for the same inputs."""
    dtype = inputs[0].dtype
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream = [torch.randn_like(output) for output in plain(*exact)]
    upstream = [g.to(dtype) for g in upstream]
    expected = results(plain, exact, upstream)
    for result, reference in zip(results(function, inputs, upstream), expected, strict=True):
        assert result.dtype == dtype and result.shape == reference.shape
        largest = float(reference.abs().max()) if reference.numel() else 0
        torch.testing.assert_close(result.double(), reference, rtol=0, atol=PRECISIONS[dtype] * max(1.0, largest))


# ---- which backend


def test_triton_takes_gpus_and_meta_and_torch_takes_cpus():
    pytest.importorskip("triton")
    names = {
        device: backend_of(torch.empty(0, device=device)).__name__.rpartition(".")[2] for device in ("cpu", "meta")
    }
    assert names == {"cpu": "triton_backend" if INTERPRETED else "cpu_backend", "meta": "triton_backend"}


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="this process runs Triton already")
def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr


# ---- the plain mathematics against torch's


def test_the_plain_norm_and_activation_are_torch_s():
    x, weight = random_rows(5, 1, 48, dtype=torch.float64), random_rows(48, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (48,), weight, 1e-5))
    torch.testing.assert_close(rms_norm(x, None, 1e-5), F.rms_norm(x, (48,), None, 1e-5))
    torch.testing.assert_close(swiglu(x), F.silu(x[..., :24]) * x[..., 24:])


def test_the_plain_rotation_is_a_rotation_of_pairs_by_their_positions():
    x, frequencies = random_rows(4, 1, 2, 6, dtype=torch.float64), torch.rand(3, dtype=torch.float64, device=DEVICE)
    positions = torch.tensor([3, 0, 7, 1], device=DEVICE)
    angles = rotary_table(frequencies, 8).index_select(1, positions)[:, :, None, None]
    rotated = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.exp(
        1j * positions[:, None, None, None] * frequencies
    )
    torch.testing.assert_close(apply_rotary(x, angles), torch.cat([rotated.real, rotated.imag], -1))


def test_plain_permutations_move_row_by_row():
    rows = random_rows(4, 1, 2, dtype=torch.float64)
    to_three = permutation([2, 0, -1], [4])
    torch.testing.assert_close(permute(to_three, rows), torch.stack([rows[2], rows[0], 0 * rows[0]]))
    back = unpermute(to_three, rows[:3])
    torch.testing.assert_close(back, torch.stack([rows[1], 0 * rows[0], rows[0], 0 * rows[0]]))


# ---- norms


@precisions
@pytest.mark.parametrize("full, kv_only, h", [(5, None, 48), (7, 3, 40), (0, 4, 64), (4, 0, 7), (1, 1, 1)])
def test_the_input_norm(dtype, full, kv_only, h):
    def plain(full: Tensor, weight: Tensor, kv_only: Tensor | None = None) -> list[Tensor]:
        normed = rms_norm(full, weight, 1e-5)
        return [full, normed] if kv_only is None else [full, kv_only, normed, rms_norm(kv_only, None, 1e-5)]

    def ours(full: Tensor, weight: Tensor, kv_only: Tensor | None = None) -> tuple:
        return functions.input_norm(full, kv_only, weight, 1e-5)

    inputs = [random_rows(full, 1, h, dtype=dtype), random_rows(h, dtype=dtype)]
    assert_close_to_float64(
        ours, plain, inputs if kv_only is None else [*inputs, random_rows(kv_only, 1, h, dtype=dtype)]
    )


@precisions
def test_the_norm_of_a_sum(dtype):
    def plain(residual: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        return [residual + x, rms_norm(residual + x, weight, 1e-5)]

    inputs = [random_rows(6, 1, 20, dtype=dtype), random_rows(6, 1, 20, dtype=dtype), random_rows(20, dtype=dtype)]
    assert_close_to_float64(lambda *arguments: functions.add_norm(*arguments, 1e-5), plain, inputs)


def test_rows_used_only_in_the_norm_have_its_gradient_alone():
    x, weight = random_rows(3, 1, 8, dtype=torch.float64), random_rows(8, dtype=torch.float64)
    assert_close_to_float64(
        lambda x, w: [functions.rms_norm(x, w, 1e-5)], lambda x, w: [rms_norm(x, w, 1e-5)], [x, weight]
    )


def test_hidden_states_leave_the_input_norm_with_the_bits_with_which_they_came():
    full, kv_only, weight = (random_rows(*shape, dtype=torch.bfloat16) for shape in ((4, 1, 8), (2, 1, 8), (8,)))
    same_full, same_kv_only, *_ = functions.input_norm(full, kv_only, weight, 1e-5)
    assert torch.equal(same_full, full) and torch.equal(same_kv_only, kv_only)


@precisions
@pytest.mark.parametrize("rows, queries", [(5, 3), (4, 0), (0, 1)])
def test_the_norm_of_queries_and_keys(dtype, rows, queries):
    def plain(heads: Tensor, weight: Tensor) -> list[Tensor]:
        normed = [rms_norm(heads[..., i, :], weight[i], 1e-5) for i in range(queries + 1)]
        return [torch.stack([*normed, heads[..., -1, :]], -2)]

    inputs = [random_rows(rows, 1, 2, queries + 2, 10, dtype=dtype), random_rows(queries + 1, 10, dtype=dtype)]
    assert_close_to_float64(lambda *arguments: [functions.head_norm(*arguments, 1e-5)], plain, inputs)


# ---- SwiGLU


@precisions
@pytest.mark.parametrize("rows, f", [(5, 12), (3, 1025), (1, 1), (0, 8)])
def test_swiglu(dtype, rows, f):
    inputs = [random_rows(rows, 1, 2 * f, dtype=dtype)]
    assert_close_to_float64(lambda x: [functions.swiglu(x)], lambda x: [swiglu(x)], inputs)


# ---- permutations of rows


def permutation(index: list[int], inputs: list[int]) -> Permutation:
    """The permutation of ``index``; -1 stands for a filler."""
    real = [i for i in index if i >= 0]
    repeated = len(set(real)) < len(real)
    return to_device(Permutation.of(np.array(index, dtype=int), inputs, repeated), DEVICE)


@precisions
@pytest.mark.parametrize(
    "index, inputs",
    [
        ([4, 0, 2, 1, 3], 5),
        ([3, 1], 6),
        ([0, 5, 2, -1, -1, -1], 6),
        ([2, 0, 2, 2, 1, 0, -1], 4),
        ([0, -1], 1),
        ([3, -1, 0, -1, 1], 4),
        ([2, -1, 2, -1, 0], 4),
    ],
    ids=["permutation", "some", "fillers", "repeated", "one", "fillers between", "repeated, fillers between"],
)
def test_rows_are_permuted_and_back(dtype, index, inputs):
    assert_permutes_like_plain(permutation(index, [inputs]), inputs, len(index), dtype)


@pytest.mark.parametrize("start, stop", [(0, 64), (10, 40)], ids=["all", "some"])
def test_rows_in_long_runs_are_permuted_and_back(start, stop):
    index = [*range(40, stop), *range(start, 40)]
    in_runs = permutation(index, [64])
    assert in_runs.runs
    assert_permutes_like_plain(in_runs, 64, len(index), torch.float64)


def assert_permutes_like_plain(order: Permutation, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    rows = random_rows(inputs, 1, 9, dtype=dtype)
    assert_close_to_float64(lambda x: [functions.permute(order, x)], lambda x: [permute(order, x)], [rows])
    if order.inverse is not None:
        permuted = random_rows(outputs, 1, 9, dtype=dtype)
        assert_close_to_float64(lambda x: [functions.unpermute(order, x)], lambda x: [unpermute(order, x)], [permuted])


# ---- queries, keys and values


@dataclass
class Case:
    """Arguments of :func:`~megatron_ext.transformer.kernels.functions.query_key_value`, permutations as indices.

    Attributes:
        runs: give the permutations also as slices.
        few: the number of rows up to which the CPU's kernels take the path for few rows.
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
    "fillers between": Case(6, 4, queries=[5, -1, 2, 0, -1], keys=[8, -1, 5, 9, 2, -1, 7, 0, 6], groups=3, q=1, d=8),
    "repeated, fillers between": Case(4, 3, queries=[3, -1, 0, 1], keys=[4, 5, -1, 3, 4, 5, 3, 0, -1, 4, 1], d=10),
    "repeated": Case(4, 3, queries=[3, 0, 1, 2], keys=[4, 5, 3, 4, 5, 3, 0, 6, 4, 1, 2], q=1),
    "repeated, fillers": Case(4, 3, queries=[3, 0, 1, -1], keys=[4, 5, 3, 4, 5, 3, 0, 4, 1, -1, -1], d=10),
    "runs": Case(4, 6, queries=[2, 3, 0, 1], keys=[4, 5, 6, 2, 3, 7, 8, 9, 0, 1], runs=True),
    "runs of some": Case(4, 6, queries=[2, 3], keys=[5, 6, 2, 3], runs=True),
    "repeated runs": Case(4, 6, queries=[2, 3, 0, 1], keys=[4, 5, 6, 2, 3, 4, 5, 6, 2, 3, 0, 1], runs=True),
    "wide": Case(3, 2, queries=[1, 2, 0], keys=[3, 1, 2, 0, 4], groups=40, q=2, d=128),
}


def with_runs(order: Permutation | None, first: int) -> Permutation | None:
    """The permutation with each row as a run, of a tensor of ``first`` rows or the next."""
    if order is None:
        return None
    return replace(order, runs=[(int(i >= first), i - first * (i >= first), 1) for i in order.index.tolist()])


def angles_of(case: Case, dtype: torch.dtype) -> RotaryAngles:
    """Angles of queries and keys; a row has the same position wherever it is used."""
    position_of_row = torch.randperm(case.full + (case.kv_only or 0) + 1).tolist()
    positions = [
        [position_of_row[i] if i >= 0 else 0 for i in (range(case.full) if index is None else index)]
        for index in (case.queries, case.keys)
    ]
    precision = torch.promote_types(dtype, torch.float32)
    table = rotary_table(torch.rand(case.d // 2, dtype=precision, device=DEVICE), len(position_of_row))
    return RotaryAngles(table, *(torch.tensor(p, dtype=torch.int32, device=DEVICE) for p in positions))


def plain_query_key_value(queries: Permutation | None, keys: Permutation | None, angles: RotaryAngles):
    exact = RotaryAngles(angles.table.double(), angles.query_positions, angles.key_positions)

    def ordered(order: Permutation | None, x: Tensor) -> Tensor:
        return x if order is None else permute(order, x)

    def compute(mixed: Tensor, kv_only: Tensor | None = None) -> list[Tensor]:
        pairs = mixed[..., -2:, :] if kv_only is None else torch.cat([mixed[..., -2:, :], kv_only])
        query, pairs = ordered(queries, mixed[..., :-2, :].flatten(2, 3)), ordered(keys, pairs)
        query = apply_rotary(query, exact.queries(torch.float64))
        return [query, apply_rotary(pairs[..., 0, :], exact.keys(torch.float64)), pairs[..., 1, :]]

    return compute


@precisions
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_queries_keys_and_values(monkeypatch, dtype, case):
    monkeypatch.setattr(cpu_rotary, "FEW", case.few)
    angles = angles_of(case, dtype)
    inputs = [case.full] if case.kv_only is None else [case.full, case.kv_only]
    queries = None if case.queries is None else permutation(case.queries, [case.full])
    keys = None if case.keys is None else permutation(case.keys, inputs)
    if case.runs:
        queries, keys = with_runs(queries, case.full), with_runs(keys, case.full)
    mixed = random_rows(case.full, 1, case.groups, case.q + 2, case.d, dtype=dtype)
    arguments = (
        [mixed] if case.kv_only is None else [mixed, random_rows(case.kv_only, 1, case.groups, 2, case.d, dtype=dtype)]
    )

    def ours(mixed: Tensor, kv_only: Tensor | None = None) -> tuple:
        return functions.query_key_value(mixed, kv_only, queries, keys, angles)

    assert_close_to_float64(ours, plain_query_key_value(queries, keys, angles), arguments)


def test_gradients_of_a_key_with_many_uses_are_rounded_once():
    uses = 64
    keys, no_rotation = permutation([1] * uses + [0], [1, 1]), torch.tensor([[[1.0]], [[0.0]]], device=DEVICE)
    positions = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (1, uses + 1))
    angles = RotaryAngles(no_rotation, *positions)
    mixed, kv_only = random_rows(1, 1, 1, 3, 2, dtype=torch.bfloat16), random_rows(1, 1, 1, 2, 2, dtype=torch.bfloat16)
    outputs = functions.query_key_value(mixed, kv_only, None, keys, angles)
    grad_key, grad_value = (torch.full_like(x, 1.0078125) for x in outputs[1:])
    (gradient,) = torch.autograd.grad(outputs, kv_only, [torch.zeros_like(outputs[0]), grad_key, grad_value])
    assert torch.equal(gradient, torch.full_like(gradient, uses * 1.0078125))
