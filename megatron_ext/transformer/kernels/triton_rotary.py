"""Triton kernels of queries, keys and values: permuted, rotated and split in one pass, and their gradients back.

A program does one row. Row numbers are int32, and int64 where they are multiplied by a stride. Rows are contiguous. The
halves of ``QUERY_BLOCK`` or ``KEY_BLOCK`` heads are done at once, ``BLOCK`` columns each, of which the first ``D // 2``
count. Arithmetic is in the table's precision and rounded where a row is stored; gradients of repeated keys are summed
in the order of their uses, without atomics.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["query_rows", "full_rows", "positions"])
def query_key_value(
    mixed,
    kv_only,
    query_index,
    key_index,
    table,
    query_positions,
    key_positions,
    query,
    key,
    value,
    query_rows,
    full_rows,
    positions,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    """A program writes a row of queries or, after those, a row of keys and values."""
    row = tl.program_id(0)
    if row < query_rows:
        source = _row_of(query_index, row)
        heads = tl.where(source >= 0, GROUPS * QUERIES, 0)  # a filler reads nothing
        cosine, sine, columns, inside = _angles(table, query_positions, row, positions, D, BLOCK)
        for start in range(0, GROUPS * QUERIES, QUERY_BLOCK):
            head = start + tl.arange(0, QUERY_BLOCK)[:, None]
            mask = inside & (head < GROUPS * QUERIES)
            # In a group, the key and the value follow the queries.
            at = mixed + source * (GROUPS * (QUERIES + 2) * D) + (head + 2 * (head // QUERIES)) * D + columns
            a, b = _halves(at, inside & (head < heads), D, cosine.dtype)
            out = query + row.to(tl.int64) * (GROUPS * QUERIES * D) + head * D + columns
            tl.store(out, a * cosine - b * sine, mask)
            tl.store(out + D // 2, b * cosine + a * sine, mask)
    else:
        row -= query_rows
        source = _row_of(key_index, row)
        groups = tl.where((source >= 0) & (source < full_rows), GROUPS, 0)
        kv_only_groups = tl.where(source >= full_rows, GROUPS, 0)
        cosine, sine, columns, inside = _angles(table, key_positions, row, positions, D, BLOCK)
        for start in range(0, GROUPS, KEY_BLOCK):
            group = start + tl.arange(0, KEY_BLOCK)[:, None]
            mask = inside & (group < GROUPS)
            here, there = inside & (group < groups), inside & (group < kv_only_groups)
            at = mixed + source * (GROUPS * (QUERIES + 2) * D) + (group * (QUERIES + 2) + QUERIES) * D + columns
            a, b = _halves(at, here, D, cosine.dtype)
            v, u = _halves(at + D, here, D, cosine.dtype)
            if kv_only is not None:
                at = kv_only + (source - full_rows) * (GROUPS * 2 * D) + group * (2 * D) + columns
                c, d = _halves(at, there, D, cosine.dtype)
                w, x = _halves(at + D, there, D, cosine.dtype)
                a, b, v, u = a + c, b + d, v + w, u + x  # one of the two summands is zeros
            out = row.to(tl.int64) * (GROUPS * D) + group * D + columns
            tl.store(key + out, a * cosine - b * sine, mask)
            tl.store(key + out + D // 2, b * cosine + a * sine, mask)
            tl.store(value + out, v, mask)
            tl.store(value + out + D // 2, u, mask)


@triton.jit(do_not_specialize=["full_rows", "positions"])
def query_key_value_backward(
    grad_query,
    grad_key,
    grad_value,
    query_inverse,
    key_inverse,
    key_starts,
    key_uses,
    table,
    query_positions,
    key_positions,
    grad_mixed,
    grad_kv_only,
    full_rows,
    positions,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    """A program writes the gradient of a FULL row or, after those, of a KV_ONLY row: rotated back, and summed over the
    uses of a repeated key."""
    row = tl.program_id(0)
    mixed_row = grad_mixed + row.to(tl.int64) * (GROUPS * (QUERIES + 2) * D)
    if row < full_rows:
        source = _row_of(query_inverse, row)
        heads = tl.where(source >= 0, GROUPS * QUERIES, 0)  # zeros for a row without a query
        cosine, sine, columns, inside = _angles(table, query_positions, source, positions, D, BLOCK)
        for start in range(0, GROUPS * QUERIES, QUERY_BLOCK):
            head = start + tl.arange(0, QUERY_BLOCK)[:, None]
            mask = inside & (head < GROUPS * QUERIES)
            at = grad_query + source * (GROUPS * QUERIES * D) + head * D + columns
            a, b = _halves(at, inside & (head < heads), D, cosine.dtype)
            out = mixed_row + (head + 2 * (head // QUERIES)) * D + columns
            tl.store(out, a * cosine + b * sine, mask)
            tl.store(out + D // 2, b * cosine - a * sine, mask)
    source, first, end = _uses_of(key_inverse, key_starts, key_uses, row)
    groups = tl.where(source >= 0, GROUPS, 0)
    cosine, sine, columns, inside = _angles(table, key_positions, source, positions, D, BLOCK)
    for start in range(0, GROUPS, KEY_BLOCK):
        group = start + tl.arange(0, KEY_BLOCK)[:, None]
        mask = inside & (group < GROUPS)
        at = source * (GROUPS * D) + group * D + columns
        a, b = _halves(grad_key + at, inside & (group < groups), D, cosine.dtype)
        v, u = _halves(grad_value + at, inside & (group < groups), D, cosine.dtype)
        if key_starts is not None:
            for use in range(first + 1, end):
                at = tl.load(key_uses + use).to(tl.int64) * (GROUPS * D) + group * D + columns
                c, d = _halves(grad_key + at, mask, D, cosine.dtype)
                w, x = _halves(grad_value + at, mask, D, cosine.dtype)
                a, b, v, u = a + c, b + d, v + w, u + x
        out = mixed_row + (group * (QUERIES + 2) + QUERIES) * D + columns
        if row >= full_rows:
            out = grad_kv_only + (row - full_rows).to(tl.int64) * (GROUPS * 2 * D) + group * (2 * D) + columns
        tl.store(out, a * cosine + b * sine, mask)
        tl.store(out + D // 2, b * cosine - a * sine, mask)
        tl.store(out + D, v, mask)
        tl.store(out + D + D // 2, u, mask)


@triton.jit
def _uses_of(key_inverse, key_starts, key_uses, row):
    """The first use of a key, -1 for none, and where its uses begin and end in ``key_uses`` (0 without repeated keys).
    All uses of a key have its position."""
    if key_starts is None:
        source, first, end = _row_of(key_inverse, row), 0, 0
    else:
        source = tl.full([], -1, tl.int64)
        first, end = tl.load(key_starts + row), tl.load(key_starts + row + 1)
        if first < end:
            source = tl.load(key_uses + first).to(tl.int64)
    return source, first, end


@triton.jit
def _row_of(index, row):
    """``index[row]``; without an index the same row."""
    if index is None:
        source = row.to(tl.int64)
    else:
        source = tl.load(index + row).to(tl.int64)
    return source


@triton.jit
def _angles(table, positions_of, row, positions, D: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines and sines [1, BLOCK] of the row's position (for row -1 those of position 0), the columns [1, BLOCK] and
    which of them count."""
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < D // 2
    position = tl.load(positions_of + row, row >= 0, 0).to(tl.int64)
    at = table + position * (D // 2) + columns
    cosine = tl.load(at, inside, 0)
    sine = tl.load(at + positions.to(tl.int64) * (D // 2), inside, 0)
    return cosine, sine, columns, inside


@triton.jit
def _halves(at, mask, D: tl.constexpr, WIDE: tl.constexpr):
    return tl.load(at, mask, 0).to(WIDE), tl.load(at + D // 2, mask, 0).to(WIDE)
