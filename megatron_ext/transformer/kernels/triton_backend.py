"""The steps as operators of torch, ``torch.ops.megatron_ext``, that launch one Triton kernel each.

An operator allocates what it returns and launches; on ``meta`` it only allocates, so a trace there counts what a GPU is
given. Nothing is read from the device.
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.routing.permutation import Permutation
from megatron_ext.transformer.kernels import triton_kernels as kernels
from megatron_ext.transformer.kernels import triton_rotary
from megatron_ext.transformer.kernels.backend import INTERPRETED
from megatron_ext.transformer.rotary import Rotary

_library = torch.library.Library("megatron_ext", "DEF")
_DEVICES = ("CUDA", "Meta", "CPU") if INTERPRETED else ("CUDA", "Meta")
_COLUMNS = 1024
"""Of a row that one program moves or activates."""
_PROGRAMS_PER_PROCESSOR = 4
"""Of the norms' backward pass: enough to hide the memory's latency, few enough for short sums at the end."""


def _operator(schema: str) -> Callable:
    """Register a function under its ``schema``; it then goes through torch's dispatcher."""

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
    """See :func:`~megatron_ext.transformer.kernels.torch_backend.norm_forward`."""
    normed, normed_kv_only, scale, kv_only_scale = _norm(full, kv_only, weight, eps)
    return (normed, None, scale, None) if kv_only is None else (normed, normed_kv_only, scale, kv_only_scale)


def add_norm_forward(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`~megatron_ext.transformer.kernels.torch_backend.add_norm_forward`."""
    return _add_norm(residual, x, weight, eps)


def norm_backward(
    of_normed: Tensor,
    of_normed_kv_only: Tensor | None,
    of_full: Tensor | None,
    of_kv_only: Tensor | None,
    full: Tensor,
    normed_kv_only: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    kv_only_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :func:`~megatron_ext.transformer.kernels.torch_backend.norm_backward`."""
    of_full, of_kv_only, of_weight = _norm_backward(
        of_normed, of_normed_kv_only, of_full, of_kv_only, full, normed_kv_only, weight, scale, kv_only_scale
    )
    return of_full, None if normed_kv_only is None else of_kv_only, of_weight


def query_key_value_forward(
    mixed: Tensor, kv_only: Tensor | None, queries: Permutation | None, keys: Permutation | None, rotary: Rotary
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`~megatron_ext.transformer.kernels.functions.query_key_value`."""
    indices = (None if by is None else by.index for by in (queries, keys))
    return _query_key_value(mixed, kv_only, *indices, rotary.table, rotary.query_positions, rotary.key_positions)


def query_key_value_backward(
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
    queries: Permutation | None,
    keys: Permutation | None,
    rotary: Rotary,
    full_rows: int,
    kv_only_rows: int | None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`~megatron_ext.transformer.kernels.torch_rotary.query_key_value_backward`."""
    of_mixed, of_kv_only = _query_key_value_backward(
        of_query,
        of_key,
        of_value,
        None if queries is None else queries.inverse,
        *((None, None, None) if keys is None else (keys.inverse, keys.starts, keys.uses)),
        rotary.table,
        rotary.query_positions,
        rotary.key_positions,
        full_rows,
        kv_only_rows or 0,
    )
    return of_mixed, None if kv_only_rows is None else of_kv_only


def gather(by: Permutation, rows: Tensor) -> Tensor:
    """See :func:`~megatron_ext.transformer.kernels.torch_rows.gather`."""
    return _gather(rows, by.index)


def gather_back(by: Permutation, rows: Tensor, inputs: int) -> Tensor:
    """See :func:`~megatron_ext.transformer.kernels.torch_rows.gather_back`."""
    return _sum_rows(rows, by.starts, by.uses) if by.inverse is None else _gather(rows, by.inverse)


@_operator("norm(Tensor full, Tensor? kv_only, Tensor weight, float eps) -> (Tensor, Tensor, Tensor, Tensor)")
def _norm(full: Tensor, kv_only: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = full[:0] if kv_only is None else kv_only
    normed, normed_kv_only = torch.empty_like(full), torch.empty_like(given)
    scale, kv_only_scale = _scale_of(full), _scale_of(given)
    outputs = normed, normed_kv_only, scale, kv_only_scale
    grid = (scale.numel() + kv_only_scale.numel(),)
    _launch(kernels.norm, grid, full, kv_only, weight, *outputs, scale.numel(), EPS=eps, **_row(full))
    return outputs


@_operator("add_norm(Tensor residual, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
def _add_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    outputs = torch.empty_like(x), torch.empty_like(x), _scale_of(x)
    _launch(kernels.add_norm, (outputs[2].numel(),), residual, x, weight, *outputs, EPS=eps, **_row(x))
    return outputs


@_operator(
    "norm_backward(Tensor of_normed, Tensor? of_normed_kv_only, Tensor? of_full, Tensor? of_kv_only, Tensor full, "
    "Tensor? normed_kv_only, Tensor weight, Tensor scale, Tensor? kv_only_scale) -> (Tensor, Tensor, Tensor)"
)
def _norm_backward(
    of_normed: Tensor,
    of_normed_kv_only: Tensor | None,
    residual: Tensor | None,
    kv_only_residual: Tensor | None,
    full: Tensor,
    normed_kv_only: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    kv_only_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    of_full = torch.empty_like(full)
    of_kv_only = torch.empty_like(full[:0] if normed_kv_only is None else normed_kv_only)
    rows, kv_only_rows = scale.numel(), 0 if kv_only_scale is None else kv_only_scale.numel()
    programs = max(1, min(max(rows, kv_only_rows), _PROGRAMS_PER_PROCESSOR * _processors(full.device)))
    parts = scale.new_empty(programs, weight.numel())
    given = of_normed, of_normed_kv_only, residual, kv_only_residual, full, normed_kv_only, weight, scale, kv_only_scale
    counts = rows, kv_only_rows
    _launch(kernels.norm_backward, (programs,), *given, of_full, of_kv_only, parts, *counts, **_row(full))
    return of_full, of_kv_only, parts.sum(0).to(weight.dtype)


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
    n, one, groups, width, d = mixed.shape
    query_rows, key_rows = (n if index is None else index.numel() for index in (query_index, key_index))
    query = mixed.new_empty(query_rows, one, groups * (width - 2), d)
    key, value = (mixed.new_empty(key_rows, one, groups, d) for _ in range(2))
    given = mixed, kv_only, query_index, key_index, table, query_positions, key_positions
    counts = query_rows, n, table.shape[1]
    grid = (query_rows + key_rows,)
    _launch(triton_rotary.query_key_value, grid, *given, query, key, value, *counts, **_heads(groups, width - 2, d))
    return query, key, value


@_operator(
    "query_key_value_backward(Tensor of_query, Tensor of_key, Tensor of_value, Tensor? query_inverse, "
    "Tensor? key_inverse, Tensor? key_starts, Tensor? key_uses, Tensor table, Tensor query_positions, "
    "Tensor key_positions, int full_rows, int kv_only_rows) -> (Tensor, Tensor)"
)
def _query_key_value_backward(
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
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
    _, one, groups, d = of_key.shape
    queries = of_query.shape[2] // groups
    of_mixed = of_key.new_empty(full_rows, one, groups, queries + 2, d)
    of_kv_only = of_key.new_empty(kv_only_rows, one, groups, 2, d)
    given = of_query, of_key, of_value, query_inverse, key_inverse, key_starts, key_uses, table
    places = query_positions, key_positions, of_mixed, of_kv_only, full_rows, table.shape[1]
    grid = (full_rows + kv_only_rows,)
    _launch(triton_rotary.query_key_value_backward, grid, *given, *places, **_heads(groups, queries, d))
    return of_mixed, of_kv_only


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
    """See :func:`~megatron_ext.transformer.kernels.torch_backend.swiglu_forward`."""
    *rows, width = gate_up.shape
    out = gate_up.new_empty(*rows, width // 2)
    grid, options = _blocks(math.prod(rows), width // 2)
    _launch(kernels.swiglu, grid, gate_up, out, F=width // 2, WIDE=_wide(out), **options)
    return out


@_operator("swiglu_backward(Tensor gradient, Tensor gate_up) -> Tensor")
def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """See :func:`~megatron_ext.transformer.kernels.torch_backend.swiglu_backward`."""
    *rows, width = gradient.shape
    out = torch.empty_like(gate_up)
    grid, options = _blocks(math.prod(rows), width)
    _launch(kernels.swiglu_backward, grid, gradient, gate_up, out, F=width, WIDE=_wide(out), **options)
    return out


def _launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Nothing is launched for no rows, nor on ``meta``."""
    if all(grid) and not arguments[0].is_meta:
        kernel[grid](*arguments, **options)


def _scale_of(rows: Tensor) -> Tensor:
    """Room for a factor of each row, [..., 1]."""
    return rows.new_empty(*rows.shape[:-1], 1, dtype=torch.promote_types(rows.dtype, torch.float32))


def _wide(rows: Tensor) -> tl.dtype:
    return tl.float64 if rows.dtype == torch.float64 else tl.float32


def _row(rows: Tensor) -> dict:
    """How the norms see rows [..., h]: whole."""
    h = rows.shape[-1]
    block = triton.next_power_of_2(h)
    return {"H": h, "WIDE": _wide(rows), "BLOCK": block, "num_warps": _warps(block)}


def _heads(groups: int, queries: int, d: int) -> dict:
    """How many heads are turned at once: registers hold so many halves of 2048 numbers, or four of 1024."""
    half = triton.next_power_of_2(d // 2)
    query_block = min(triton.next_power_of_2(groups * queries), max(1, 2048 // half))
    key_block = min(triton.next_power_of_2(groups), max(1, 1024 // half))
    blocks = {"BLOCK": half, "QUERY_BLOCK": query_block, "KEY_BLOCK": key_block}
    return {"GROUPS": groups, "QUERIES": queries, "D": d, **blocks, "num_warps": _warps(half * query_block)}


def _blocks(rows: int, width: int) -> tuple[tuple[int, int], dict]:
    """A grid over rows of ``width`` numbers that are done a block at a time."""
    block = min(triton.next_power_of_2(width), _COLUMNS)
    return (rows, triton.cdiv(width, block)), {"BLOCK": block, "num_warps": _warps(block)}


def _warps(numbers: int) -> int:
    """16 numbers for each thread."""
    return min(max(numbers // 512, 1), 16)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
