"""One micro-batch under a plan: what every layer needs to know of it, worked out once from integers.

Every pipeline stage and every tensor-parallel rank holds the same :class:`~megatron_ext.data.batch.Batch`, so each
works out the same route for itself; nothing of it travels with hidden states.

**Stored order.** Tokens that the plan treats alike in every layer form a group, and the hidden states of a
micro-batch, [T, 1, h], are stored group after group. The tokens that take part in a layer are then a few slices of
the hidden states and no copy; so are those that use one kind of weights. Within a group tokens keep their order, and a
plan that treats all tokens alike stores them as they came. Padding is not stored.

**Ranks.** Under sequence parallelism the rows are cut over R ranks, and each rank's share holds an R-th of every group:
whatever takes part in a layer, the ranks have equally much to do and to gather. Rows that make up the numbers are
dummies. Gathered rows stand rank after rank.

**Attention** needs documents: ``queries`` and ``keys`` bring rows into the order of documents. A run of FULL tokens
without a KV_ONLY token between attends all keys of its document up to its own end, causally: a segment of q queries
and k >= q keys whose last query sees all k (bottom-right aligned).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.routing.dense_share import Draw
from megatron_ext.routing.groups import plan_groups, stored_length, token_classes
from megatron_ext.routing.plan import Plan, Role
from megatron_ext.routing.row_map import RowMap
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality


@dataclass
class Pieces:
    """Some rows of a rank's share of the hidden states [T / R, 1, h].

    Attributes:
        sizes: rows of consecutive pieces; they add up to T / R.
        full, kv_only: which of the pieces are FULL and KV_ONLY.
        full_splits, kv_only_splits: (component, rows) of those rows in order; component 0 is W.
    """

    sizes: list[int]
    full: list[int]
    kv_only: list[int]
    full_splits: list[tuple[int, int]]
    kv_only_splits: list[tuple[int, int]]


@dataclass
class CachePlaces:
    """Where queries and keys belong when keys of earlier tokens are kept: every row is a piece of one document. Always
    on the host.

    Attributes:
        query_rows, key_rows: row of each query and key of this piece, in attention's order.
        query_visible: keys of this piece that each query sees, its own included.
        query_ranks, key_ranks: queries and keys of its row before each query and key of this piece.
        query_counts, key_counts: of each row.
    """

    query_rows: Tensor
    query_visible: Tensor
    query_ranks: Tensor
    query_counts: Tensor
    key_rows: Tensor
    key_ranks: Tensor
    key_counts: Tensor


@dataclass
class LayerRoute:
    """What one layer does with a micro-batch. Layers with the same roles share one.

    Attributes:
        pieces: which rows take part.
        queries: from gathered FULL rows to attention's order; None: the same.
        keys: from gathered FULL and gathered KV_ONLY rows to the order of keys; None without KV_ONLY rows, when keys
            are ordered like queries.
        query_lengths, key_lengths: of each segment.
        query_positions, key_positions: rotary positions in attention's order.
        cu_seqlens_q, cu_seqlens_kv: cumulative lengths, int32 [segments + 1].
        rotary: angles of queries and keys; filled in by the model before its first layer.
        places, cache: with a cache of keys, what goes where in it (``generation/cache.py``); None in training.
    """

    pieces: Pieces
    queries: RowMap | None
    keys: RowMap | None
    query_lengths: list[int]
    key_lengths: list[int]
    query_positions: Tensor
    key_positions: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    rotary: object = None
    places: CachePlaces | None = None
    cache: object = None


@dataclass
class Route(PackedSeqParams):
    """The route of one micro-batch of b rows of s tokens.

    Derived from ``PackedSeqParams`` because an unmodified ``TransformerBlock`` hands that to every layer, under
    activation recomputation too.

    Attributes:
        order: [T] flat index into b * s of each stored row, -1 for a dummy.
        tokens: [1, T] token ids as stored.
        image_places: [T] which token of its image each stored row is, from 1; 0: of none (see :func:`image_places`).
        longest_image: the largest of them.
        longest_document: one more than the largest position of a token.
        layers: the route of each layer of the whole model, by its number from 0.
        targets: [n] flat indices into b * s, ascending, of the tokens whose logits are wanted.
        head: the pieces that hold those tokens; their gathered rows become the targets' by ``head_rows``.
    """

    order: Tensor = None
    tokens: Tensor = None
    image_places: Tensor = None
    longest_image: int = 0
    longest_document: int = 0
    layers: list[LayerRoute] = field(default_factory=list)
    targets: Tensor = None
    head: Pieces = None
    head_rows: RowMap | None = None

    @classmethod
    def of(
        cls,
        batch: Batch,
        plan: Plan,
        ranks: int = 1,
        multiple: int = 1,
        fixed_length: bool = False,
        wanted: Tensor | None = None,
        cached: bool = False,
        draw: Draw | None = None,
        places: Tensor | None = None,
    ) -> "Route":
        """The route of one micro-batch of [b, s] tokens, on the host.

        Args:
            batch: on the host.
            ranks: over how many ranks the hidden states are cut (sequence parallelism).
            multiple: rows of a group on a rank are rounded up to a multiple of this (FP8 kernels want one).
            fixed_length: T depends on b * s alone, as the messages between pipeline stages must.
            wanted: where logits are wanted, bool [b, s]; None: where the loss counts. Padding has none.
            cached: each row is the next piece of a document whose earlier keys are kept. Keys are then all the keys of
                a piece, in order.
            draw: this step's draw of the plan's dense share; None: as in evaluation.
            places: [b, s], of :func:`image_places`; None: of whole documents.
        """
        real = (batch.document != PADDING_DOCUMENT).flatten()
        groups = plan_groups(plan)
        group = torch.tensor(groups.of_class)[token_classes(batch, plan, draw).flatten()]
        group[~real] = len(groups.members)
        t = real.numel()
        members = [(group == g).nonzero().flatten() for g in range(len(groups.members))]
        step = ranks * multiple
        sizes = [-(-m.numel() // step) * multiple for m in members]
        if fixed_length:
            sizes.append(stored_length(t, plan, ranks, multiple) // ranks - sum(sizes))
            members.append(members[0][:0])
        stored = [torch.cat([m, m.new_full((ranks * n - m.numel(),), -1)]) for m, n in zip(members, sizes)]
        order = torch.cat([rows.view(ranks, -1) for rows in stored], dim=1).flatten()
        where = torch.full((t,), -1)
        where[order[order >= 0]] = (order >= 0).nonzero().flatten()
        facts = _Facts(batch, group, where, sizes, ranks, groups.components)

        by_roles = {}
        for roles in groups.roles:
            if roles not in by_roles:
                by_roles[roles] = _layer_route(facts, list(roles) + [Role.SKIP] * fixed_length, cached)
        wanted = (batch.loss_mask if wanted is None else wanted).flatten() > 0
        targets = (wanted & real).nonzero().flatten()
        needed = torch.zeros(len(sizes), dtype=torch.bool)
        needed[group[targets]] = True
        places = (image_places(batch) if places is None else places).flatten()
        head = _pieces(sizes, [Role.FULL if n else Role.SKIP for n in needed], facts.components)
        return cls(
            order=order,
            tokens=batch.tokens.flatten()[order.clamp(min=0)].unsqueeze(0),
            image_places=places[order.clamp(min=0)],
            longest_image=int(places.max()) if t else 0,
            longest_document=int(batch.positions.max()) + 1 if t else 0,
            layers=[by_roles[roles] for roles in groups.roles],
            targets=targets,
            head=head,
            head_rows=RowMap.of(facts.compact(head.full, head.sizes)[targets], [ranks * _rows(head.full_splits)]),
        )

    def to(self, device: torch.device) -> "Route":
        """The same route on ``device``; what layers share stays shared."""
        return self if device.type == "cpu" else _moved(self, device, {})


def image_places(batch: Batch, before: Tensor | None = None) -> Tensor:
    """[b, s]: which token of its image each token is, from 1 in the order of the document; 0 for text.

    An image that a document's cut divides begins anew, as the document's positions do.

    Args:
        before: [b], where rows are pieces of documents: image tokens right before the first token of each row.
    """
    image, column = batch.modality == Modality.IMAGE, torch.arange(batch.shape[1])
    first = image.clone()
    first[:, 1:] &= ~image[:, :-1] | (batch.document[:, 1:] != batch.document[:, :-1])
    start = torch.where(first, column, 0).cummax(dim=1).values
    places = column - start + 1
    if before is not None:
        places = places + torch.where(start == 0, before[:, None], 0)
    return torch.where(image, places, 0)


@dataclass
class _Facts:
    """A micro-batch on the host. group, where: [t], by flat index; where: the stored row."""

    batch: Batch
    group: Tensor
    where: Tensor
    sizes: list[int]
    ranks: int
    components: Sequence[int]

    def compact(self, chosen: list[int], sizes: list[int]) -> Tensor:
        """[t] row of each token when only the ``chosen`` of pieces of ``sizes`` rows are kept and gathered; -1 for
        tokens elsewhere."""
        offsets, start = torch.full((sum(sizes),), -1), 0
        kept = sum(sizes[i] for i in chosen)
        used = 0
        for i, size in enumerate(sizes):
            if i in chosen:
                offsets[start : start + size] = torch.arange(used, used + size)
                used += size
            start += size
        if not offsets.numel():
            return torch.full_like(self.where, -1)
        rank, offset = self.where // offsets.numel(), offsets[self.where % offsets.numel()]
        return torch.where((self.where >= 0) & (offset >= 0), rank * kept + offset, -1)


def _layer_route(facts: _Facts, roles: list[Role], cached: bool) -> LayerRoute:
    pieces = _pieces(facts.sizes, roles, facts.components)
    role = torch.tensor([*roles, Role.SKIP])[facts.group]  # [t]; padding's group comes after the last
    key = (role != Role.SKIP).nonzero().flatten()
    document = _document_numbers(facts.batch.document)[key]
    full = role[key] == Role.FULL
    # Runs of FULL tokens among the keys, and for each the first key of its document.
    new = torch.ones_like(full)
    new[1:] = document[1:] != document[:-1]
    before, after = full.roll(1) & ~new, full.roll(-1) & ~new.roll(-1)
    first, end = (full & ~before).nonzero().flatten(), (full & ~after).nonzero().flatten() + 1
    documents = new.nonzero().flatten()
    begin = documents[torch.searchsorted(documents, first, right=True) - 1]
    query_lengths, key_lengths = end - first, end - begin

    query, rows = key[full], facts.ranks * _rows(pieces.full_splits)
    position = facts.batch.positions.flatten()
    compact = facts.compact(pieces.full, pieces.sizes)
    queries, keys, seen = RowMap.of(compact[query], [rows]), None, query
    query_positions = position[query]
    if pieces.kv_only:
        kv_rows = facts.ranks * _rows(pieces.kv_only_splits)
        kv_compact = facts.compact(pieces.kv_only, pieces.sizes)
        compact = torch.where(kv_compact >= 0, rows + kv_compact, compact)
        seen, repeated = key, False
        if not cached:
            skipped = begin - torch.nn.functional.pad(key_lengths.cumsum(0)[:-1], (1, 0))
            index = torch.arange(int(key_lengths.sum())) + skipped.repeat_interleave(key_lengths)
            seen, repeated = key[index], first.numel() > begin.unique().numel()
        keys = RowMap.of(compact[seen], [rows, kv_rows], repeated)
    return LayerRoute(
        pieces=pieces,
        queries=queries,
        keys=keys,
        query_lengths=query_lengths.tolist(),
        key_lengths=key_lengths.tolist(),
        query_positions=query_positions,
        key_positions=query_positions if seen is query else position[seen],
        cu_seqlens_q=_cumulative(query_lengths),
        cu_seqlens_kv=_cumulative(key_lengths),
        places=_cache_places(key, full, *facts.batch.shape) if cached else None,
    )


def _cache_places(key: Tensor, full: Tensor, rows: int, s: int) -> CachePlaces:
    """Of the flat indices of the keys in ``rows`` rows of s, and which of them are queries too."""
    row = key // s
    query_counts, key_counts = (torch.bincount(x, minlength=rows) for x in (row[full], row))
    ranks = torch.arange(key.numel()) - (key_counts.cumsum(0) - key_counts)[row]
    return CachePlaces(
        query_rows=row[full],
        query_visible=ranks[full] + 1,
        query_ranks=torch.arange(int(full.sum())) - (query_counts.cumsum(0) - query_counts)[row[full]],
        query_counts=query_counts,
        key_rows=row,
        key_ranks=ranks,
        key_counts=key_counts,
    )


def _pieces(sizes: list[int], roles: Sequence[Role], components: Sequence[int]) -> Pieces:
    """Pieces of consecutive groups with one role; empty groups take no piece."""
    groups = [(role, size, c) for role, size, c in zip(roles, sizes, [*components, 0]) if size]
    runs = [(role, list(run)) for role, run in groupby(groups, key=lambda g: g[0])]

    def of(wanted: Role) -> tuple[list[int], list[tuple[int, int]]]:
        chosen = [(c, size) for role, size, c in groups if role == wanted]
        splits = [(c, sum(n for _, n in run)) for c, run in groupby(chosen, key=lambda split: split[0])]
        return [i for i, (role, _) in enumerate(runs) if role == wanted], splits

    (full, full_splits), (kv_only, kv_only_splits) = of(Role.FULL), of(Role.KV_ONLY)
    return Pieces([sum(n for _, n, _ in run) for _, run in runs], full, kv_only, full_splits, kv_only_splits)


def _rows(splits: list[tuple[int, int]]) -> int:
    return sum(n for _, n in splits)


def _document_numbers(document: Tensor) -> Tensor:
    """[t] number of the run of equal values in ``document`` [b, s] that each token is in; rows never share a run."""
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    return starts.flatten().cumsum(0)


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _moved(value, device: torch.device, seen: dict):
    """``value`` with its tensors on ``device``; what is shared stays shared."""
    if id(value) not in seen:
        if isinstance(value, Tensor):
            seen[id(value)] = value.to(device, non_blocking=True)
        elif isinstance(value, list):
            seen[id(value)] = [_moved(v, device, seen) for v in value]
        elif isinstance(value, (Route, LayerRoute, RowMap)):
            seen[id(value)] = type(value)(
                **{f.name: _moved(getattr(value, f.name), device, seen) for f in fields(value)}
            )
        else:
            seen[id(value)] = value
    return seen[id(value)]
