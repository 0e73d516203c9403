"""How one layer processes a micro-batch: the rows that take part, their order in attention, and where documents begin
and end.

A run of FULL tokens without a KV_ONLY token in between attends causally to all keys of its document up to the end of
the run: a segment of q queries and k >= q keys whose last query sees all k (bottom-right aligned). The segments of a
document share its keys, which are in attention's order once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import numpy as np

from megatron_ext.data.batch import Batch
from megatron_ext.routing.context import Exchange, Placement
from megatron_ext.routing.permutation import Permutation
from megatron_ext.routing.roles import Role
from megatron_ext.routing.segment_buckets import Bucket, filled, in_order

SEGMENTS_MULTIPLE = 16
"""Attention kernels receive a multiple of this many segments, and the longest length rounded up to a power of two, so
that their execution plans can be reused for the next micro-batch."""


@dataclass
class RowSlices:
    """A rank's share of the hidden states [T / R, 1, h] as slices of rows with one role.

    Attributes:
        sizes: rows of consecutive slices; they add up to T / R.
        full, kv_only: indices of the FULL and of the KV_ONLY slices.
        full_splits, kv_only_splits: (component, rows) of those rows in order; component 0 is W.
    """

    sizes: list[int]
    full: list[int]
    kv_only: list[int]
    full_splits: list[tuple[int, int]]
    kv_only_splits: list[tuple[int, int]]


@dataclass
class CachePlaces:
    """Places of queries and keys when the keys of earlier tokens are cached: every row is a piece of one document.
    Always on the host.

    Attributes:
        query_rows, key_rows: row of each query and key of this piece, in the order of attention.
        query_visible: keys of this piece that each query sees, its own included.
        query_ranks, key_ranks: for each query and key of this piece, the queries and keys before it in its row.
        query_counts, key_counts: queries and keys of each row.
    """

    on_host: ClassVar[bool] = True

    query_rows: np.ndarray
    query_visible: np.ndarray
    query_ranks: np.ndarray
    query_counts: np.ndarray
    key_rows: np.ndarray
    key_ranks: np.ndarray
    key_counts: np.ndarray


@dataclass
class LayerRoute:
    """How one layer processes a micro-batch; layers with the same roles share one route.

    Arrays on the host, tensors on a device. Orders may have fillers, rows that belong to no token: after the last
    segment, or, if segments are brought into buckets, after each.

    Attributes:
        slices: the rows that take part.
        queries: from gathered FULL rows to the order of attention; None: they are in that order already.
        keys: from gathered FULL, gathered KV_ONLY and received rows to the order of keys; None without KV_ONLY rows and
            an exchange, when keys have the order of the queries.
        query_lengths, key_lengths: queries and keys of each segment, in document order.
        key_starts: row of the keys at which those of each segment begin. Segments of one document share its keys: these
            rows overlap. This list and the two before describe attention's order only where segments are not brought
            into buckets.
        segment_keys: from the order of keys to one in which every segment has its own, for kernels that take cumulative
            lengths; None: it has them already.
        buckets: the segments that share a kernel call, in attention's order.
        query_positions, key_positions: rotary positions in the order of attention, int32; 0 for fillers.
        cu_seqlens_q, cu_seqlens_kv: cumulative lengths, int32 [segments + 1], followed by empty segments; of keys after
            ``segment_keys``.
        max_query_length, max_key_length: bounds of the lengths, powers of two.
        exchange: the keys that context ranks send one another; None: none of them sends any.
    """

    slices: RowSlices
    queries: Permutation | None
    keys: Permutation | None
    query_lengths: list[int]
    key_lengths: list[int]
    key_starts: list[int]
    segment_keys: Permutation | None
    buckets: list[Bucket]
    query_positions: np.ndarray
    key_positions: np.ndarray
    cu_seqlens_q: np.ndarray
    cu_seqlens_kv: np.ndarray
    max_query_length: int
    max_key_length: int
    exchange: Exchange | None


@dataclass
class CachedLayerRoute(LayerRoute):
    """How one layer processes the next pieces of documents whose earlier keys are in a cache.

    Attributes:
        places: the places of queries and keys in the cache (``generation/cache.py``).
    """

    places: CachePlaces


@dataclass
class StoredRows:
    """A micro-batch [b, s] of t tokens in stored order.

    Attributes:
        batch: the micro-batch, as arrays.
        group, stored: [t], group and stored row of each token; the group of padding comes after the last. Tokens that
            another context rank holds have no row, -1.
        document: [t], number of the document over the whole micro-batch.
        sizes: rows of each group on a rank.
        ranks: number of ranks that the rows are cut over.
        components: the weights that each group uses.
        multiple: queries, keys and targets are filled up to a multiple of this.
        bucketed: whether attention's order has similar segments together, filled up to equal lengths.
        context_rank, placement: this rank's number among the context ranks, and what each of them holds; None: one
            holds all.
    """

    batch: Batch
    group: np.ndarray
    stored: np.ndarray
    document: np.ndarray
    sizes: list[int]
    ranks: int
    components: Sequence[int]
    multiple: int
    bucketed: bool
    context_rank: int
    placement: Placement | None

    def gathered(self, chosen: list[int], sizes: list[int]) -> np.ndarray:
        """[t] row of each token once the ``chosen`` slices, out of slices of ``sizes`` rows, are gathered from all
        ranks; -1 for tokens of other slices."""
        offsets, start, kept = np.full(sum(sizes), -1), 0, 0
        for i, size in enumerate(sizes):
            if i in chosen:
                offsets[start : start + size] = np.arange(kept, kept + size)
                kept += size
            start += size
        if not offsets.size:
            return np.full_like(self.stored, -1)
        rank, offset = self.stored // offsets.size, offsets[self.stored % offsets.size]
        return np.where((self.stored >= 0) & (offset >= 0), rank * kept + offset, -1)

    def with_fillers(self, index: np.ndarray) -> np.ndarray:
        """``index``, followed by as many fillers, -1, as ``multiple`` needs."""
        return np.pad(index, (0, -index.size % self.multiple), constant_values=-1)


def layer_route(rows: StoredRows, roles: Sequence[Role], cached: bool) -> LayerRoute:
    """The route of a layer in which the groups have ``roles``.

    Args:
        cached: keys are all the keys of a piece, in order (see :meth:`~megatron_ext.routing.route.Route.of`).
    """
    slices = row_slices(rows.sizes, roles, rows.components)
    role = np.array([*roles, Role.SKIP])[rows.group]
    key = np.flatnonzero(role != Role.SKIP)
    full = (role[key] == Role.FULL) & (rows.stored[key] >= 0)
    first, end, begin = _segments(rows.document[key], full)
    query_lengths, key_lengths = end - first, end - begin
    seen, key_starts = (np.arange(key.size), begin) if cached else _seen_keys(begin, end)
    order = filled(query_lengths, key_lengths, key_starts) if rows.bucketed and not cached else None
    shared = not cached and key_lengths.sum() > seen.size

    query, gathered_rows = key[full], rows.ranks * row_count(slices.full_splits)
    received = None if rows.placement is None else rows.placement.received(roles, rows.context_rank)
    query = rows.with_fillers(_select(query, order.query_index) if order else query)
    gathered = rows.gathered(slices.full, slices.sizes)
    queries, keys = Permutation.of(_select(gathered, query), [gathered_rows]), None
    query_positions = key_positions = _positions(rows.batch, query)
    exchange = None
    if slices.kv_only or received is not None:
        kv_rows = rows.ranks * row_count(slices.kv_only_splits)
        kv_gathered = rows.gathered(slices.kv_only, slices.sizes)
        if received is not None:
            exchange = rows.placement.exchange(roles, rows.context_rank, gathered, kv_gathered)
        gathered = np.where(kv_gathered >= 0, gathered_rows + kv_gathered, gathered)
        if received is not None:
            gathered[received] = gathered_rows + kv_rows + np.arange(received.size)
            kv_rows += received.size
        seen = key[seen]
        seen = rows.with_fillers(_select(seen, order.key_index) if order else seen)
        keys = Permutation.of(_select(gathered, seen), [gathered_rows, kv_rows], shared and order is not None)
        key_positions = _positions(rows.batch, seen)
    segment_keys = None
    if shared and not rows.bucketed:
        index = rows.with_fillers(_ranges(key_starts, key_lengths))
        segment_keys = Permutation.of(index, [key_positions.size], repeated=True)
    route = LayerRoute(
        slices=slices,
        queries=queries,
        keys=keys,
        query_lengths=query_lengths.tolist(),
        key_lengths=key_lengths.tolist(),
        key_starts=key_starts.tolist(),
        segment_keys=segment_keys,
        buckets=order.buckets if order else in_order(query_lengths, key_lengths, key_starts),
        query_positions=query_positions,
        key_positions=key_positions,
        cu_seqlens_q=_cumulative(query_lengths),
        cu_seqlens_kv=_cumulative(key_lengths),
        max_query_length=_power_of_two(query_lengths),
        max_key_length=_power_of_two(key_lengths),
        exchange=exchange,
    )
    return CachedLayerRoute(**vars(route), places=_cache_places(key, full, *rows.batch.shape)) if cached else route


def segment_key_rows(document: np.ndarray, role: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys of each segment of attention where segments share keys, and the token at which it begins; both empty
    where none do.

    Args:
        document, role: of each token, [t]; documents in order.
    """
    key = np.flatnonzero(role != Role.SKIP)
    first, end, begin = _segments(document[key], role[key] == Role.FULL)
    if not first.size or (begin[1:] != begin[:-1]).all():
        return first[:0], first[:0]
    return end - begin, key[first]


def row_slices(sizes: list[int], roles: Sequence[Role], components: Sequence[int]) -> RowSlices:
    """Slices of consecutive groups with one role; empty groups have no slice."""
    groups = [(role, size, c) for role, size, c in zip(roles, sizes, [*components, 0]) if size]
    runs = [(role, list(run)) for role, run in groupby(groups, key=lambda g: g[0])]

    def slices_with(own_role: Role) -> tuple[list[int], list[tuple[int, int]]]:
        chosen = [(c, size) for role, size, c in groups if role == own_role]
        splits = [(c, sum(n for _, n in run)) for c, run in groupby(chosen, key=lambda split: split[0])]
        return [i for i, (role, _) in enumerate(runs) if role == own_role], splits

    (full, full_splits), (kv_only, kv_only_splits) = slices_with(Role.FULL), slices_with(Role.KV_ONLY)
    return RowSlices([sum(n for _, n, _ in run) for _, run in runs], full, kv_only, full_splits, kv_only_splits)


def row_count(splits: list[tuple[int, int]]) -> int:
    """Total rows of ``splits``."""
    return sum(n for _, n in splits)


def _segments(document: np.ndarray, full: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each run of FULL keys, the indices of the keys at which it begins, it ends and its document begins.

    Args:
        document: document of each key.
        full: whether each key is FULL.
    """
    new = np.ones_like(full)
    new[1:] = document[1:] != document[:-1]
    before, after = np.roll(full, 1) & ~new, np.roll(full, -1) & ~np.roll(new, -1)
    first, end = np.flatnonzero(full & ~before), np.flatnonzero(full & ~after) + 1
    documents = np.flatnonzero(new)
    return first, end, documents[np.searchsorted(documents, first, side="right") - 1]


def _seen_keys(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the keys that some query sees, each once, and for each segment the place among them at which its keys
    begin; from the results of :func:`_segments`."""
    new = np.ones(begin.size, dtype=bool)
    new[1:] = begin[1:] != begin[:-1]
    last = np.roll(new, -1)
    lengths = end[last] - begin[last]
    starts = lengths.cumsum() - lengths
    return _ranges(begin[last], lengths), starts[new.cumsum() - 1]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each start on, as many as its length."""
    return np.arange(lengths.sum()) + (starts - (lengths.cumsum() - lengths)).repeat(lengths)


def _select(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """``values[index]``, -1 where ``index`` is -1."""
    return np.where(index < 0, -1, values[index]) if values.size else np.full_like(index, -1)


def _positions(batch: Batch, tokens: np.ndarray) -> np.ndarray:
    return np.where(tokens < 0, 0, batch.positions.ravel()[tokens]).astype(np.int32)


def _cumulative(lengths: np.ndarray) -> np.ndarray:
    segments = -(-max(lengths.size, 1) // SEGMENTS_MULTIPLE) * SEGMENTS_MULTIPLE
    ends = np.full(segments + 1, lengths.sum(), dtype=np.int32)
    ends[: lengths.size + 1] = np.concatenate([[0], lengths.cumsum()])
    return ends


def _power_of_two(lengths: np.ndarray) -> int:
    """The longest length rounded up; at least 64, since some cuDNN kernels need a multiple of 64."""
    return 1 << (int(lengths.max(initial=64)) - 1).bit_length()


def _cache_places(key: np.ndarray, full: np.ndarray, rows: int, s: int) -> CachePlaces:
    """The places of keys, given as flat indices into ``rows`` rows of s; ``full``: which of them are also queries."""
    row = key // s
    query_counts, key_counts = (np.bincount(x, minlength=rows) for x in (row[full], row))
    ranks = np.arange(key.size) - (key_counts.cumsum() - key_counts)[row]
    return CachePlaces(
        query_rows=row[full],
        query_visible=ranks[full] + 1,
        query_ranks=np.arange(int(full.sum())) - (query_counts.cumsum() - query_counts)[row[full]],
        query_counts=query_counts,
        key_rows=row,
        key_ranks=ranks,
        key_counts=key_counts,
    )
