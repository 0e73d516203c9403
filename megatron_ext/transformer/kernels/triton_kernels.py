"""The kernels. A program does a row (norms: rows one after the other), all of its columns at once.

Row numbers are int32; where they meet a stride they become int64. Rows are contiguous; ``H``, ``D`` and the like are the
real widths, ``BLOCK`` the power of two above. Arithmetic is in ``WIDE``, float32 or float64, and rounded where a row is
stored. Sums run in a fixed order: there are no atomics.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["full_rows"])
def norm(full, kv_only, weight, normed, normed_kv_only, scale, kv_only_scale, full_rows,
         H: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
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
def add_norm(residual, x, weight, total, normed, scale,
             H: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The norm of the sum as it is stored."""
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
def norm_backward(of_normed, of_normed_kv_only, residual, kv_only_residual, full, normed_kv_only, weight, scale,
                  kv_only_scale, of_full, of_kv_only, of_weight, full_rows, kv_only_rows,
                  H: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Every program has an equal share of the rows and writes its part of the weight's gradient, [programs, H]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    w = tl.load(weight + columns, inside, 0).to(WIDE)
    part = tl.zeros([BLOCK], WIDE)
    for row in range(program, full_rows, programs):
        at = tl.cast(row, tl.int64) * H + columns
        g = tl.load(of_normed + at, inside, 0).to(WIDE)
        s = tl.load(scale + row)
        y = tl.load(full + at, inside, 0).to(WIDE) * s
        part += g * y
        _store_gradient(of_full, residual, at, inside, g * w, y, s, H, WIDE)
    tl.store(of_weight + program * H + columns, part, inside)
    if normed_kv_only is not None:
        for row in range(program, kv_only_rows, programs):
            at = tl.cast(row, tl.int64) * H + columns
            g = tl.load(of_normed_kv_only + at, inside, 0).to(WIDE)
            y = tl.load(normed_kv_only + at, inside, 0).to(WIDE)
            _store_gradient(of_kv_only, kv_only_residual, at, inside, g, y, tl.load(kv_only_scale + row), H, WIDE)


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


@triton.jit(do_not_specialize=["query_rows", "full_rows", "positions"],
            do_not_specialize_on_alignment=["query_index", "key_index", "query_positions", "key_positions"])  # fmt: skip
def query_key_value(mixed, kv_only, query_index, key_index, table, query_positions, key_positions, query, key, value,
                    query_rows, full_rows, positions, GROUPS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
                    BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr):  # fmt: skip
    """A program writes a row of queries or, after those, a row of keys and values."""
    row = tl.program_id(0)
    if row < query_rows:
        source = _row_of(query_index, row)
        heads = tl.where(source >= 0, GROUPS * QUERIES, 0)  # a filler reads nothing
        cosine, sine, columns, inside = _angles(table, query_positions, row, positions, D, BLOCK)
        for start in range(0, GROUPS * QUERIES, QUERY_BLOCK):
            head = start + tl.arange(0, QUERY_BLOCK)[:, None]
            mask = inside & (head < GROUPS * QUERIES)
            # A group has its key and its value after its queries.
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
                a, b, v, u = a + c, b + d, v + w, u + x  # of either, one is zeros
            out = row.to(tl.int64) * (GROUPS * D) + group * D + columns
            tl.store(key + out, a * cosine - b * sine, mask)
            tl.store(key + out + D // 2, b * cosine + a * sine, mask)
            tl.store(value + out, v, mask)
            tl.store(value + out + D // 2, u, mask)


@triton.jit(do_not_specialize=["full_rows", "positions"],
            do_not_specialize_on_alignment=["query_inverse", "key_inverse", "key_starts", "key_uses",
                                            "query_positions", "key_positions"])  # fmt: skip
def query_key_value_backward(of_query, of_key, of_value, query_inverse, key_inverse, key_starts, key_uses, table,
                             query_positions, key_positions, of_mixed, of_kv_only, full_rows, positions,
                             GROUPS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
                             BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr):  # fmt: skip
    """A program writes the gradient of one FULL or, after those, KV_ONLY row: turned back, and of a key that is used
    several times the sum."""
    row = tl.program_id(0)
    mixed_row = of_mixed + row.to(tl.int64) * (GROUPS * (QUERIES + 2) * D)
    if row < full_rows:
        source = _row_of(query_inverse, row)
        heads = tl.where(source >= 0, GROUPS * QUERIES, 0)  # of a row that nothing became: zeros
        cosine, sine, columns, inside = _angles(table, query_positions, source, positions, D, BLOCK)
        for start in range(0, GROUPS * QUERIES, QUERY_BLOCK):
            head = start + tl.arange(0, QUERY_BLOCK)[:, None]
            mask = inside & (head < GROUPS * QUERIES)
            at = of_query + source * (GROUPS * QUERIES * D) + head * D + columns
            a, b = _halves(at, inside & (head < heads), D, cosine.dtype)
            out = mixed_row + (head + 2 * (head // QUERIES)) * D + columns
            tl.store(out, a * cosine + b * sine, mask)
            tl.store(out + D // 2, b * cosine - a * sine, mask)
    if key_starts is None:
        source = _row_of(key_inverse, row)
    else:
        source = tl.full([], -1, tl.int64)
        first, end = tl.load(key_starts + row), tl.load(key_starts + row + 1)
        if first < end:  # every use of a key has its position
            source = tl.load(key_uses + first).to(tl.int64)
    groups = tl.where(source >= 0, GROUPS, 0)
    cosine, sine, columns, inside = _angles(table, key_positions, source, positions, D, BLOCK)
    for start in range(0, GROUPS, KEY_BLOCK):
        group = start + tl.arange(0, KEY_BLOCK)[:, None]
        mask = inside & (group < GROUPS)
        at = source * (GROUPS * D) + group * D + columns
        a, b = _halves(of_key + at, inside & (group < groups), D, cosine.dtype)
        v, u = _halves(of_value + at, inside & (group < groups), D, cosine.dtype)
        if key_starts is not None:
            for use in range(first + 1, end):
                at = tl.load(key_uses + use).to(tl.int64) * (GROUPS * D) + group * D + columns
                c, d = _halves(of_key + at, mask, D, cosine.dtype)
                w, x = _halves(of_value + at, mask, D, cosine.dtype)
                a, b, v, u = a + c, b + d, v + w, u + x
        out = mixed_row + (group * (QUERIES + 2) + QUERIES) * D + columns
        if row >= full_rows:
            out = of_kv_only + (row - full_rows).to(tl.int64) * (GROUPS * 2 * D) + group * (2 * D) + columns
        tl.store(out, a * cosine + b * sine, mask)
        tl.store(out + D // 2, b * cosine - a * sine, mask)
        tl.store(out + D, v, mask)
        tl.store(out + D + D // 2, u, mask)


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
    """Cosines and sines [1, BLOCK] of the row's position, and which columns [1, BLOCK] there are; of row -1 zeros."""
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


@triton.jit(do_not_specialize_on_alignment=["index"])
def gather(rows, index, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A block of columns of a row in another order; -1: zeros."""
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + row).to(tl.int64)
    x = tl.load(rows + source * WIDTH + columns, columns < tl.where(source >= 0, WIDTH, 0), 0)
    tl.store(out + row.to(tl.int64) * WIDTH + columns, x, columns < WIDTH)


@triton.jit(do_not_specialize_on_alignment=["starts", "uses"])
def sum_rows(rows, starts, uses, out, WIDTH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of columns of the sum of all uses of a row."""
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
def swiglu_backward(gradient, gate_up, out, F: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Both gradients: g up sigmoid (1 + gate (1 - sigmoid)) and g gate sigmoid."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    at = row * (2 * F) + columns
    gate = tl.load(gate_up + at, inside, 0).to(WIDE)
    up = tl.load(gate_up + at + F, inside, 0).to(WIDE)
    g = tl.load(gradient + row * F + columns, inside, 0).to(WIDE)
    share = tl.sigmoid(gate)
    tl.store(out + at, g * up * share * (1 + gate * (1 - share)), inside)
    tl.store(out + at + F, g * gate * share, inside)
