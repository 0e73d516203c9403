"""The steps as torch operators, ``torch.ops.megatron_ext``, that launch one Triton kernel each.

An operator allocates its outputs and launches the kernel; on ``meta`` it only allocates, so a trace there counts a
GPU's launches. No operator reads from the device.
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.routing.permutation import Permutation
from megatron_ext.transformer.kernels import INTERPRETED, triton_head_norm, triton_rotary
from megatron_ext.transformer.kernels import triton_kernels as kernels
from megatron_ext.transformer.rotary import RotaryAngles

_library = torch.library.Library("megatron_ext", "DEF")
_DEVICES = ("CUDA", "Meta", "CPU") if INTERPRETED else ("CUDA", "Meta")
_COLUMNS = 1024
"""Of a row, per program, in kernels that permute or activate."""
_PROGRAMS_PER_PROCESSOR = 4
"""In the norms' backward pass: enough to hide the memory's latency, few enough to keep the final sum short."""


def _operator(schema: str) -> Callable:
    """Register a function as the torch operator of a ``schema``."""

    def register(function: Callable) -> Callable:
        name = schema.partition("(")[0]
        _library.define(schema)
        for device in _DEVICES:
            _library.impl(name, function, device)
        return getattr(torch.ops.megatron_ext, name).default

    return register


def norm_forward(
    full: Tensor, kv_only: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """See :func:`~megatron_ext.transformer.kernels.cpu_backend.norm_forward`."""
    normed, normed_kv_only, scale, kv_only_scale = _norm(full, kv_only, weight, eps)
    return (normed, None, scale, None) if kv_only is None else (normed, normed_kv_only, scale, kv_only_scale)


def add_norm_forward(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`~megatron_ext.transformer.kernels.cpu_backend.add_norm_forward`."""
    return _add_norm(residual, x, weight, eps)


def norm_backward(
    grad_normed: Tensor,
    grad_normed_kv_only: Tensor | None,
    grad_full: Tensor | None,
    grad_kv_only: Tensor | None,
    full: Tensor,
    normed_kv_only: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    kv_only_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :func:`~megatron_ext.transformer.kernels.cpu_backend.norm_backward`."""
    grad_full, grad_kv_only, grad_weight = _norm_backward(
        grad_normed, grad_normed_kv_only, grad_full, grad_kv_only, full, normed_kv_only, weight, scale, kv_only_scale
    )
    return grad_full, None if normed_kv_only is None else grad_kv_only, grad_weight


def query_key_value_forward(
    mixed: Tensor, kv_only: Tensor | None, queries: Permutation | None, keys: Permutation | None, rotary: RotaryAngles
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`~megatron_ext.transformer.kernels.functions.query_key_value`."""
    indices = (None if permutation is None else permutation.index for permutation in (queries, keys))
    return _query_key_value(mixed, kv_only, *indices, rotary.table, rotary.query_positions, rotary.key_positions)


def query_key_value_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    queries: Permutation | None,
    keys: Permutation | None,
    rotary: RotaryAngles,
    full_rows: int,
    kv_only_rows: int | None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`~megatron_ext.transformer.kernels.cpu_rotary.query_key_value_backward`."""
    grad_mixed, grad_kv_only = _query_key_value_backward(
        grad_query,
        grad_key,
        grad_value,
        None if queries is None else queries.inverse,
        *((None, None, None) if keys is None else (keys.inverse, keys.starts, keys.uses)),
        rotary.table,
        rotary.query_positions,
        rotary.key_positions,
        full_rows,
        kv_only_rows or 0,
    )
    return grad_mixed, None if kv_only_rows is None else grad_kv_only


def permute(permutation: Permutation, rows: Tensor) -> Tensor:
    """See :func:`~megatron_ext.transformer.kernels.cpu_permutation.permute`."""
    return _gather(rows, permutation.index)


def unpermute(permutation: Permutation, rows: Tensor, inputs: int) -> Tensor:
    """See :func:`~megatron_ext.transformer.kernels.cpu_permutation.unpermute`."""
    if permutation.inverse is None:
        return _sum_rows(rows, permutation.starts, permutation.uses)
    return _gather(rows, permutation.inverse)


@_operator("norm(Tensor full, Tensor? kv_only, Tensor weight, float eps) -> (Tensor, Tensor, Tensor, Tensor)")
def _norm(full: Tensor, kv_only: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kv_only_rows = full[:0] if kv_only is None else kv_only
    normed, normed_kv_only = torch.empty_like(full), torch.empty_like(kv_only_rows)
    scale, kv_only_scale = _empty_scale(full), _empty_scale(kv_only_rows)
    outputs = normed, normed_kv_only, scale, kv_only_scale
    grid = (scale.numel() + kv_only_scale.numel(),)
    _launch(kernels.norm, grid, full, kv_only, weight, *outputs, scale.numel(), EPS=eps, **_row(full))
    return outputs


@_operator("add_norm(Tensor residual, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
def _add_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    outputs = torch.empty_like(x), torch.empty_like(x), _empty_scale(x)
    _launch(kernels.add_norm, (outputs[2].numel(),), residual, x, weight, *outputs, EPS=eps, **_row(x))
    return outputs


@_operator(
    "norm_backward(Tensor grad_normed, Tensor? grad_normed_kv_only, Tensor? grad_full, Tensor? grad_kv_only, "
    "Tensor full, Tensor? normed_kv_only, Tensor weight, Tensor scale, Tensor? kv_only_scale) "
    "-> (Tensor, Tensor, Tensor)"
)
def _norm_backward(
    grad_normed: Tensor,
    grad_normed_kv_only: Tensor | None,
    residual: Tensor | None,
    kv_only_residual: Tensor | None,
    full: Tensor,
    normed_kv_only: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    kv_only_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_full = torch.empty_like(full)
    grad_kv_only = torch.empty_like(full[:0] if normed_kv_only is None else normed_kv_only)
    rows, kv_only_rows = scale.numel(), 0 if kv_only_scale is None else kv_only_scale.numel()
    programs = _programs(max(rows, kv_only_rows), full)
    parts = scale.new_empty(programs, weight.numel())
    inputs = (
        grad_normed,
        grad_normed_kv_only,
        residual,
        kv_only_residual,
        full,
        normed_kv_only,
        weight,
        scale,
        kv_only_scale,
    )
    counts = rows, kv_only_rows
    _launch(kernels.norm_backward, (programs,), *inputs, grad_full, grad_kv_only, parts, *counts, **_row(full))
    return grad_full, grad_kv_only, parts.sum(0).to(weight.dtype)


@_operator("head_norm(Tensor rows, Tensor weight, float eps) -> (Tensor, Tensor)")
def head_norm_forward(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`~megatron_ext.transformer.kernels.cpu_head_norm.head_norm_forward`."""
    outputs = torch.empty_like(rows), _empty_scale(rows[..., :-1, :])
    _launch(triton_head_norm.head_norm, (math.prod(rows.shape[:3]),), rows, weight, *outputs, EPS=eps, **_group(rows))
    return outputs


@_operator("head_norm_backward(Tensor grad, Tensor rows, Tensor weight, Tensor scale) -> (Tensor, Tensor)")
def head_norm_backward(grad: Tensor, rows: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`~megatron_ext.transformer.kernels.cpu_head_norm.head_norm_backward`."""
    groups, grad_rows = math.prod(rows.shape[:3]), torch.empty_like(rows)
    parts = scale.new_empty(_programs(groups, rows), *weight.shape)
    inputs = grad, rows, weight, scale, grad_rows, parts, groups
    _launch(triton_head_norm.head_norm_backward, (len(parts),), *inputs, **_group(rows))
    return grad_rows, parts.sum(0).to(weight.dtype)


@_operator(
    "query_key_value(Tensor mixed, Tensor? kv_only, Tensor? query_index, Tensor? key_index, Tensor table, "
    "Tensor query_positions, Tensor key_positions) -> (Tensor, Tensor, Tensor)"
)
def _query_key_value(
    mixed: Tensor,
    kv_only: Tensor | None,
    query_index: Tensor | None,
    key_index: Tensor | None,
    table: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    n, batch, groups, width, d = mixed.shape
    query_rows, key_rows = (n if index is None else index.numel() for index in (query_index, key_index))
    query = mixed.new_empty(query_rows, batch, groups * (width - 2), d)
    key, value = (mixed.new_empty(key_rows, batch, groups, d) for _ in range(2))
    inputs = mixed, kv_only, query_index, key_index, table, query_positions, key_positions
    counts = query_rows, n, table.shape[1]
    grid = (query_rows + key_rows,)
    _launch(triton_rotary.query_key_value, grid, *inputs, query, key, value, *counts, **_heads(groups, width - 2, d))
    return query, key, value


@_operator(
    "query_key_value_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor? query_inverse, "
    "Tensor? key_inverse, Tensor? key_starts, Tensor? key_uses, Tensor table, Tensor query_positions, "
    "Tensor key_positions, int full_rows, int kv_only_rows) -> (Tensor, Tensor)"
)
def _query_key_value_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    query_inverse: Tensor | None,
    key_inverse: Tensor | None,
    key_starts: Tensor | None,
    key_uses: Tensor | None,
    table: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    full_rows: int,
    kv_only_rows: int,
) -> tuple[Tensor, Tensor]:
    _, batch, groups, d = grad_key.shape
    queries = grad_query.shape[2] // groups
    grad_mixed = grad_key.new_empty(full_rows, batch, groups, queries + 2, d)
    grad_kv_only = grad_key.new_empty(kv_only_rows, batch, groups, 2, d)
    inputs = grad_query, grad_key, grad_value, query_inverse, key_inverse, key_starts, key_uses, table
    outputs = query_positions, key_positions, grad_mixed, grad_kv_only, full_rows, table.shape[1]
    grid = (full_rows + kv_only_rows,)
    _launch(triton_rotary.query_key_value_backward, grid, *inputs, *outputs, **_heads(groups, queries, d))
    return grad_mixed, grad_kv_only


@_operator("gather(Tensor rows, Tensor index) -> Tensor")
def _gather(rows: Tensor, index: Tensor) -> Tensor:
    out = rows.new_empty(index.numel(), *rows.shape[1:])
    width = math.prod(rows.shape[1:])
    grid, options = _blocks(out.shape[0], width)
    _launch(kernels.gather, grid, rows, index, out, WIDTH=width, **options)
    return out


@_operator("sum_rows(Tensor rows, Tensor starts, Tensor uses) -> Tensor")
def _sum_rows(rows: Tensor, starts: Tensor, uses: Tensor) -> Tensor:
    out = rows.new_empty(starts.numel() - 1, *rows.shape[1:])
    width = math.prod(rows.shape[1:])
    grid, options = _blocks(out.shape[0], width)
    _launch(kernels.sum_rows, grid, rows, starts, uses, out, WIDTH=width, WIDE=_wide(rows), **options)
    return out


@_operator("swiglu(Tensor gate_up) -> Tensor")
def swiglu_forward(gate_up: Tensor) -> Tensor:
    """See :func:`~megatron_ext.transformer.kernels.cpu_backend.swiglu_forward`."""
    *rows, width = gate_up.shape
    out = gate_up.new_empty(*rows, width // 2)
    grid, options = _blocks(math.prod(rows), width // 2)
    _launch(kernels.swiglu, grid, gate_up, out, F=width // 2, WIDE=_wide(out), **options)
    return out


@_operator("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor")
def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """See :func:`~megatron_ext.transformer.kernels.cpu_backend.swiglu_backward`."""
    *rows, width = grad.shape
    out = torch.empty_like(gate_up)
    grid, options = _blocks(math.prod(rows), width)
    _launch(kernels.swiglu_backward, grid, grad, gate_up, out, F=width, WIDE=_wide(out), **options)
    return out


def _launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Launch, unless there are no rows or the tensors are on ``meta``."""
    if all(grid) and not arguments[0].is_meta:
        kernel[grid](*arguments, **options)


def _empty_scale(rows: Tensor) -> Tensor:
    """An empty tensor for a factor per row, [..., 1]."""
    return rows.new_empty(*rows.shape[:-1], 1, dtype=torch.promote_types(rows.dtype, torch.float32))


def _wide(rows: Tensor) -> tl.dtype:
    return tl.float64 if rows.dtype == torch.float64 else tl.float32


def _row(rows: Tensor) -> dict:
    """Options of the norms' kernels for rows [..., h]: a program does whole rows."""
    h = rows.shape[-1]
    block = triton.next_power_of_2(h)
    return {"H": h, "WIDE": _wide(rows), "BLOCK": block, "num_warps": _warps(block)}


def _programs(count: int, rows: Tensor) -> int:
    """Programs that share ``count`` rows in turn."""
    return max(1, min(count, _PROGRAMS_PER_PROCESSOR * _processors(rows.device)))


def _group(rows: Tensor) -> dict:
    """Options of the kernels that norm heads [..., heads, d]: a program does whole groups."""
    (heads, d), (head_block, block) = rows.shape[-2:], map(triton.next_power_of_2, rows.shape[-2:])
    sizes = {"HEADS": heads, "D": d, "HEAD_BLOCK": head_block, "BLOCK": block}
    return sizes | {"WIDE": _wide(rows), "num_warps": _warps(head_block * block)}


def _heads(groups: int, queries: int, d: int) -> dict:
    """Options of the kernels of queries, keys and values: registers hold two halves of 2048 numbers, or four of 1024,
    at once."""
    half = triton.next_power_of_2(d // 2)
    query_block = min(triton.next_power_of_2(groups * queries), max(1, 2048 // half))
    key_block = min(triton.next_power_of_2(groups), max(1, 1024 // half))
    blocks = {"BLOCK": half, "QUERY_BLOCK": query_block, "KEY_BLOCK": key_block}
    return {"GROUPS": groups, "QUERIES": queries, "D": d, **blocks, "num_warps": _warps(half * query_block)}


def _blocks(rows: int, width: int) -> tuple[tuple[int, int], dict]:
    """Grid and options of kernels that do a block of a row of ``width`` numbers per program."""
    block = min(triton.next_power_of_2(width), _COLUMNS)
    return (rows, triton.cdiv(width, block)), {"BLOCK": block, "num_warps": _warps(block)}


def _warps(numbers: int) -> int:
    """16 numbers per thread."""
    return min(max(numbers // 512, 1), 16)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
