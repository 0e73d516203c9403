"""Triton kernels of norms, permutations of rows and SwiGLU.

A program does one row, or a block of its columns (the norms' backward pass: several rows in turn). Row numbers are
int32, and int64 where they are multiplied by a stride. Rows are contiguous; ``H``, ``WIDTH`` and ``F`` are the widths
of rows, ``BLOCK`` is a power of two. Arithmetic is in ``WIDE``, float32 or float64, and rounded where a row is stored.
Sums run in a fixed order: there are no atomics.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["full_rows"])
def norm(
    full,
    kv_only,
    weight,
    normed,
    normed_kv_only,
    scale,
    kv_only_scale,
    full_rows,
    H: tl.constexpr,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x s w of FULL rows, y = x s of KV_ONLY rows."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    if row < full_rows:
        at = row.to(tl.int64) * H + columns
        x = tl.load(full + at, inside, 0).to(WIDE)
        s = _inverse_rms(x, H, EPS)
        tl.store(normed + at, x * s * tl.load(weight + columns, inside, 0).to(WIDE), inside)
        tl.store(scale + row, s)
    elif kv_only is not None:
        at = (row - full_rows).to(tl.int64) * H + columns
        x = tl.load(kv_only + at, inside, 0).to(WIDE)
        s = _inverse_rms(x, H, EPS)
        tl.store(normed_kv_only + at, x * s, inside)
        tl.store(kv_only_scale + row - full_rows, s)


@triton.jit
def add_norm(
    residual,
    x,
    weight,
    total,
    normed,
    scale,
    H: tl.constexpr,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum, and the norm of the sum as rounded for storage."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    at = row.to(tl.int64) * H + columns
    added = tl.load(residual + at, inside, 0).to(WIDE) + tl.load(x + at, inside, 0).to(WIDE)
    added = added.to(total.dtype.element_ty)
    tl.store(total + at, added, inside)
    added = added.to(WIDE)
    s = _inverse_rms(added, H, EPS)
    tl.store(normed + at, added * s * tl.load(weight + columns, inside, 0).to(WIDE), inside)
    tl.store(scale + row, s)


@triton.jit(do_not_specialize=["full_rows", "kv_only_rows"])
def norm_backward(
    grad_normed,
    grad_normed_kv_only,
    residual,
    kv_only_residual,
    full,
    normed_kv_only,
    weight,
    scale,
    kv_only_scale,
    grad_full,
    grad_kv_only,
    grad_weight,
    full_rows,
    kv_only_rows,
    H: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program does an equal share of the rows and writes its part of the weight's gradient, [programs, H]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    w = tl.load(weight + columns, inside, 0).to(WIDE)
    part = tl.zeros([BLOCK], WIDE)
    for row in range(program, full_rows, programs):
        at = tl.cast(row, tl.int64) * H + columns
        g = tl.load(grad_normed + at, inside, 0).to(WIDE)
        s = tl.load(scale + row)
        y = tl.load(full + at, inside, 0).to(WIDE) * s
        part += g * y
        _store_gradient(grad_full, residual, at, inside, g * w, y, s, H, WIDE)
    tl.store(grad_weight + program * H + columns, part, inside)
    if normed_kv_only is not None:
        for row in range(program, kv_only_rows, programs):
            at = tl.cast(row, tl.int64) * H + columns
            g = tl.load(grad_normed_kv_only + at, inside, 0).to(WIDE)
            y = tl.load(normed_kv_only + at, inside, 0).to(WIDE)
            _store_gradient(grad_kv_only, kv_only_residual, at, inside, g, y, tl.load(kv_only_scale + row), H, WIDE)


@triton.jit
def _inverse_rms(x, H: tl.constexpr, EPS: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, 0) / H + EPS)


@triton.jit
def _store_gradient(out, residual, at, inside, g, y, s, H: tl.constexpr, WIDE: tl.constexpr):
    """dx = s (g - y mean(g y)), for y = x s."""
    gradient = s * (g - y * (tl.sum(g * y, 0) / H))
    if residual is not None:
        gradient += tl.load(residual + at, inside, 0).to(WIDE)
    tl.store(out + at, gradient, inside)


@triton.jit
def gather(rows, index, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A block of columns of an output row, which is input row ``index``; -1: zeros."""
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + row).to(tl.int64)
    x = tl.load(rows + source * WIDTH + columns, columns < tl.where(source >= 0, WIDTH, 0), 0)
    tl.store(out + row.to(tl.int64) * WIDTH + columns, x, columns < WIDTH)


@triton.jit
def sum_rows(rows, starts, uses, out, WIDTH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of columns of the sum of all output rows that an input row became."""
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.zeros([BLOCK], WIDE)
    for use in range(tl.load(starts + row), tl.load(starts + row + 1)):
        total += tl.load(rows + tl.load(uses + use).to(tl.int64) * WIDTH + columns, inside, 0).to(WIDE)
    tl.store(out + row.to(tl.int64) * WIDTH + columns, total, inside)


@triton.jit
def swiglu(gate_up, out, F: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of columns of silu(gate) up."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(gate_up + row * (2 * F) + columns, inside, 0).to(WIDE)
    up = tl.load(gate_up + row * (2 * F) + F + columns, inside, 0).to(WIDE)
    tl.store(out + row * F + columns, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def swiglu_backward(grad, gate_up, out, F: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of gate and up: g up sigmoid (1 + gate (1 - sigmoid)) and g gate sigmoid."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    at = row * (2 * F) + columns
    gate = tl.load(gate_up + at, inside, 0).to(WIDE)
    up = tl.load(gate_up + at + F, inside, 0).to(WIDE)
    g = tl.load(grad + row * F + columns, inside, 0).to(WIDE)
    share = tl.sigmoid(gate)
    tl.store(out + at, g * up * share * (1 + gate * (1 - share)), inside)
    tl.store(out + at + F, g * gate * share, inside)
