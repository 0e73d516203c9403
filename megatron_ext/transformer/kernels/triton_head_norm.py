"""Triton kernels of the norm of queries and keys over their heads.

A program does a group (the backward pass: several groups in turn): ``HEADS - 1`` queries and keys, which are normed,
and a value, which is copied, each of ``D`` numbers. ``HEAD_BLOCK`` and ``BLOCK`` are powers of two. Groups are
contiguous. Arithmetic is in ``WIDE``, float32 or float64, and rounded where a row is stored. There are no atomics.
"""

import triton
import triton.language as tl


@triton.jit
def head_norm(
    rows,
    weight,
    normed,
    scale,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x s w, and s."""
    group = tl.program_id(0).to(tl.int64)
    head, inside, with_norm, place = _tile(HEADS, D, HEAD_BLOCK, BLOCK)
    at = group * (HEADS * D) + place
    x = tl.load(rows + at, inside, 0).to(WIDE)
    w = tl.load(weight + place, with_norm, 0).to(WIDE)
    s = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
    tl.store(normed + at, tl.where(head < HEADS - 1, x * s * w, x), inside)
    tl.store(scale + group * (HEADS - 1) + head, s, head < HEADS - 1)


@triton.jit(do_not_specialize=["groups"])
def head_norm_backward(
    grad,
    rows,
    weight,
    scale,
    grad_rows,
    grad_weight,
    groups,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = s (g w - y mean(g w y)) for y = x s, and the program's part of the weight's gradient, [programs, w, D]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    head, inside, with_norm, place = _tile(HEADS, D, HEAD_BLOCK, BLOCK)
    w = tl.load(weight + place, with_norm, 0).to(WIDE)
    part = tl.zeros([HEAD_BLOCK, BLOCK], WIDE)
    for number in range(program, groups, programs):
        group = tl.cast(number, tl.int64)
        at = group * (HEADS * D) + place
        g = tl.load(grad + at, inside, 0).to(WIDE)
        s = tl.load(scale + group * (HEADS - 1) + head, head < HEADS - 1, 0)
        y = tl.load(rows + at, inside, 0).to(WIDE) * s
        part += g * y
        gradient = s * (g * w - y * (tl.sum(g * w * y, 1) / D)[:, None])
        tl.store(grad_rows + at, tl.where(head < HEADS - 1, gradient, g), inside)
    tl.store(grad_weight + program * ((HEADS - 1) * D) + place, part, with_norm)


@triton.jit
def _tile(HEADS: tl.constexpr, D: tl.constexpr, HEAD_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Heads [HEAD_BLOCK, 1] of a group; which numbers of [HEAD_BLOCK, BLOCK] count, which are normed, and their place
    in the group."""
    head, columns = tl.arange(0, HEAD_BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (columns < D)
    return head, inside, inside & (head < HEADS - 1), head * D + columns
