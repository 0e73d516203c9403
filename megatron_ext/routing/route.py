"""The route of one micro-batch under a plan: the index data of every layer, computed once from integers.

Every pipeline stage and every tensor-parallel rank holds the same :class:`~megatron_ext.data.batch.Batch` and computes
the same route from it; no part of the route travels with hidden states.

**Stored order.** Tokens that the plan treats alike in every layer form a group, and the hidden states of a
micro-batch, [T, 1, h], are stored group after group. The tokens that take part in a layer are then a few slices of
the hidden states, without a copy; so are the tokens that share weights. Within a group tokens keep their order, so a
plan that treats all tokens alike keeps the order of the batch. Padding is not stored.

**Ranks.** Under sequence parallelism the rows are cut over R ranks, each of which holds an R-th of every group: ranks
compute and gather equal amounts in every layer. Dummy rows make groups divisible. Gathered rows are ordered by rank.
Under context parallelism each of C ranks has a route of its own, of the tokens that it holds
(:mod:`~megatron_ext.routing.context`); T is then the rows of one context rank.

**Attention** needs whole documents; :mod:`~megatron_ext.routing.layer_route` brings rows into document order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_ext.data.batch import Batch
from megatron_ext.routing.context import Placement, attention_load, place, quotas
from megatron_ext.routing.dense_share import Selection
from megatron_ext.routing.groups import plan_groups, stored_length, token_classes
from megatron_ext.routing.layer_route import LayerRoute, RowSlices, StoredRows, layer_route, row_count, row_slices
from megatron_ext.routing.permutation import Permutation
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role
from megatron_ext.token_classes import PADDING_DOCUMENT, Modality

if TYPE_CHECKING:  # worker processes build routes of arrays and need not import torch
    import torch


@dataclass
class Route:
    """The route of one micro-batch of b rows of s tokens: arrays on the host, tensors once it is on a device.

    Attributes:
        tokens: [1, T] token ids as stored, int32.
        layers: the route of each layer of the whole model, indexed from 0.
        head: the slices that hold the targets, the tokens that predict; ``head_rows`` brings their gathered rows into
            the order of the targets.
        targets: [n] flat indices into b * s of the tokens with logits, ascending; fillers follow in the logits. None
            once no longer needed.
        order: [T] flat index into b * s of each stored row, -1 for a dummy. None once no longer needed.
        image_places: [T] place of each stored row in its image, from 1; 0 outside of images (see
            :func:`image_places`).
        longest_image: the largest image place.
        longest_document: the largest position of a token, plus one.
        image_rows, codes: with several codes an image token, for each rank the local rows [n] of its image tokens,
            int64, and their codes [n, D], int32. ``tokens`` then has 0 in place of them.
        code_head_rows: brings the rows of ``head`` into the order of the code targets, which predict such tokens.
        code_targets: [m] flat indices of the code targets, as ``targets``, which are then all others.
        target_codes: [m and fillers, D], the codes that they predict, int64; 0 for fillers.
    """

    tokens: np.ndarray
    layers: list[LayerRoute]
    head: RowSlices
    head_rows: Permutation | None
    targets: np.ndarray | None
    order: np.ndarray | None
    image_places: np.ndarray | None
    longest_image: int = 0
    longest_document: int = 0
    image_rows: list[np.ndarray] | None = None
    codes: list[np.ndarray] | None = None
    code_head_rows: Permutation | None = None
    code_targets: np.ndarray | None = None
    target_codes: np.ndarray | None = None

    @classmethod
    def of(cls, batch: Batch, plan: Plan, *alignment: int, **options) -> Route:
        """:meth:`arrays` of a batch on the host as tensors there."""
        from megatron_ext.data.transfer import to_device

        return to_device(cls.arrays(batch, plan, *alignment, **options), "cpu")

    def to(self, device: torch.device) -> Route:
        """The same route on ``device``; layers keep sharing their routes."""
        from megatron_ext.data.transfer import to_device

        return self if device.type == "cpu" else to_device(self, device)

    @classmethod
    def arrays(
        cls,
        batch: Batch,
        plan: Plan,
        ranks: int = 1,
        multiple: int = 1,
        fixed_length: bool = False,
        logit_mask: np.ndarray | None = None,
        cached: bool = False,
        selection: Selection | None = None,
        places: np.ndarray | None = None,
        fill: int = 1,
        bucketed: bool = False,
        code_mask: np.ndarray | None = None,
        context: tuple[int, int] = (0, 1),
        placement: Placement | None = None,
    ) -> Route:
        """The route of one micro-batch of [b, s] tokens on the host, as arrays.

        Args:
            ranks: number of ranks that the hidden states are cut over (sequence parallelism).
            multiple: rows of a group on a rank are rounded up to a multiple of this (FP8 kernels need one).
            fixed_length: make T depend on b * s alone, as messages between pipeline stages require.
            logit_mask: where to compute logits, bool [b, s]; None: where the loss counts. Padding has none.
            cached: each row is the next piece of a document with earlier keys in a cache; all its keys then count.
            selection: this step's selection of the plan's dense share; None: that of evaluation.
            places: [b, s], result of :func:`image_places`; None: computed for whole documents.
            fill: queries, keys and targets are filled up to a multiple of this, so that shapes repeat.
            bucketed: bring similar segments of attention together and fill them up to equal lengths
                (:mod:`~megatron_ext.routing.segment_buckets`). Not with ``cached``.
            code_mask: bool [b, s], which targets predict an image token of several codes; None: those before one.
            context: the context rank of the route, and the number of context ranks.
            placement: result of :func:`placed`, the same for all; None: computed, for attention alone.
        """
        batch, groups = batch.arrays(), plan_groups(plan)
        if cached and context[1] > 1:
            raise ValueError("with a cache context ranks are replicas")
        group = _groups_of_tokens(batch, plan, selection)
        if context[1] > 1 and placement is None:
            placement = placed(batch, plan, context[1], ranks, multiple, selection)
        alignment = ranks, multiple, fixed_length
        rows, order = _stored_rows(batch, plan, group, *alignment, fill, bucketed, context, placement)
        fill_up = [Role.SKIP] * fixed_length
        by_roles = {roles: layer_route(rows, [*roles, *fill_up], cached) for roles in set(groups.roles)}
        mask = (batch.loss_mask > 0) if logit_mask is None else np.asarray(logit_mask)
        targets = np.flatnonzero(mask.ravel() & (group < len(rows.components)))
        head, targets = _head(rows, targets), targets[rows.stored[targets] >= 0]
        places = (image_places(batch) if places is None else np.asarray(places)).ravel()
        route = cls(
            tokens=batch.tokens.ravel()[order.clip(min=0)].astype(np.int32)[None],
            layers=[by_roles[roles] for roles in groups.roles],
            head=head,
            head_rows=_head_rows(rows, head, targets),
            targets=targets,
            order=order,
            image_places=places[order.clip(min=0)].astype(np.int32),
            longest_image=int(places.max(initial=0)),
            longest_document=int(batch.positions.max(initial=-1)) + 1,
        )
        return route if batch.codes is None else route._with_codes(rows, code_mask)

    def _with_codes(self, rows: StoredRows, code_mask: np.ndarray | None) -> Route:
        """The route with what image tokens of several codes need: the codes that enter, and targets of their own."""
        batch, order = rows.batch, self.order
        code_mask = batch.predicts_image() if code_mask is None else np.asarray(code_mask)
        codes = batch.codes.reshape(-1, batch.codes.shape[-1])
        image = batch.modality.ravel()[order.clip(min=0)] == Modality.IMAGE
        self.tokens = np.where(image, 0, self.tokens)  # dummies, which repeat the first token, too
        image &= order >= 0
        of_rank = list(zip(image.reshape(rows.ranks, -1), order.reshape(rows.ranks, -1)))
        self.image_rows = [np.flatnonzero(chosen) for chosen, _ in of_rank]
        self.codes = [codes[index[chosen]].astype(np.int32) for chosen, index in of_rank]
        predicts_codes = code_mask.ravel()[self.targets]
        self.code_targets, self.targets = self.targets[predicts_codes], self.targets[~predicts_codes]
        self.head_rows, self.code_head_rows = (
            _head_rows(rows, self.head, targets) for targets in (self.targets, self.code_targets)
        )
        # The last token of a row predicts nothing that is known here.
        following = np.append(codes, np.zeros_like(codes[:1]), axis=0)[rows.with_fillers(self.code_targets) + 1]
        following[self.code_targets.size :] = 0
        self.target_codes = following.astype(np.int64)
        return self


def placed(
    batch: Batch,
    plan: Plan,
    size: int,
    ranks: int = 1,
    multiple: int = 1,
    selection: Selection | None = None,
    pair_cost: int = 1,
    head_costs: np.ndarray | None = None,
) -> Placement:
    """The placement of a micro-batch's tokens on ``size`` context ranks; other arguments as for :meth:`Route.arrays`.

    Args:
        pair_cost: work of a pair of query and key in a layer.
        head_costs: [b, s], work of each token after the layers, int64; None: there is none.
    """
    batch, groups = batch.arrays(), plan_groups(plan)
    group, document = _groups_of_tokens(batch, plan, selection), _document_numbers(batch)
    load = attention_load(group, document, groups.roles, pair_cost)
    if head_costs is not None:
        load += head_costs.ravel()
    of_ranks = quotas(group, len(groups.members), ranks * size, multiple)
    return place(group, document, load, [ranks * rows for rows in of_ranks], size)


def image_places(batch: Batch, before: np.ndarray | None = None) -> np.ndarray:
    """[b, s]: place of each token in its image, from 1 in document order; 0 for text. ``batch`` holds arrays.

    Where a document is cut within an image, places restart at 1, as the document's positions restart.

    Args:
        before: [b], where rows are pieces of documents: image tokens right before the first token of each row.
    """
    image, column = batch.modality == Modality.IMAGE, np.arange(batch.shape[1])
    first = image.copy()
    first[:, 1:] &= ~image[:, :-1] | batch.document_starts()[:, 1:]
    start = np.maximum.accumulate(np.where(first, column, 0), axis=1)
    places = column - start + 1
    if before is not None:
        places = places + np.where(start == 0, before[:, None], 0)
    return np.where(image, places, 0)


def _head(rows: StoredRows, targets: np.ndarray) -> RowSlices:
    """The slices that hold the tokens ``targets`` [n]."""
    needed = np.isin(np.arange(len(rows.sizes)), rows.group[targets])
    return row_slices(rows.sizes, [Role.FULL if n else Role.SKIP for n in needed], rows.components)


def _head_rows(rows: StoredRows, head: RowSlices, targets: np.ndarray) -> Permutation | None:
    """The way from the gathered rows of ``head`` to the order of ``targets`` [n]."""
    gathered = rows.gathered(head.full, head.sizes)[targets]
    return Permutation.of(rows.with_fillers(gathered), [rows.ranks * row_count(head.full_splits)])


def _groups_of_tokens(batch: Batch, plan: Plan, selection: Selection | None) -> np.ndarray:
    """[t] group of each token of a batch of arrays; that of padding comes after the last."""
    groups = plan_groups(plan)
    group = np.array(groups.of_class)[token_classes(batch, plan, selection).ravel()]
    group[(batch.document == PADDING_DOCUMENT).ravel()] = len(groups.members)
    return group


def _stored_rows(
    batch: Batch,
    plan: Plan,
    group: np.ndarray,
    ranks: int,
    multiple: int,
    fixed_length: bool,
    fill: int,
    bucketed: bool,
    context: tuple[int, int],
    placement: Placement | None,
) -> tuple[StoredRows, np.ndarray]:
    """The stored rows of a context rank, and [T] the flat index of each.

    Args: those of :meth:`Route.arrays`, with the ``group`` of each token.
    """
    groups, (rank, size) = plan_groups(plan), context
    count = len(groups.members)
    length = stored_length(group.size, plan, ranks * size, multiple) // size if fixed_length else None
    held = group if placement is None else np.where(placement.owner == rank, group, count)
    order, sizes = _stored_order(held, quotas(group, count, ranks * size, multiple), ranks, length)
    stored, document = _places(order, group.size), _document_numbers(batch)
    rows = StoredRows(batch, group, stored, document, sizes, ranks, groups.components, fill, bucketed, rank, placement)
    return rows, order


def _stored_order(group: np.ndarray, sizes: list[int], ranks: int, length: int | None) -> tuple[np.ndarray, list[int]]:
    """Flat index of each stored row, ordered by rank, and the number of rows of each group on a rank, ``sizes``; with a
    ``length`` T, dummy rows up to it as one more group."""
    members = [np.flatnonzero(group == g) for g in range(len(sizes))]
    if length is not None:
        members.append(group[:0])
        sizes = [*sizes, length // ranks - sum(sizes)]
    stored = [np.pad(m, (0, ranks * n - m.size), constant_values=-1) for m, n in zip(members, sizes)]
    return np.concatenate([rows.reshape(ranks, -1) for rows in stored], axis=1).ravel(), sizes


def _places(order: np.ndarray, tokens: int) -> np.ndarray:
    """[tokens] the stored row of each token, -1 for padding, from the token of each stored row."""
    places = np.full(tokens, -1)
    places[order[order >= 0]] = np.flatnonzero(order >= 0)
    return places


def _document_numbers(batch: Batch) -> np.ndarray:
    """[t] for each token, the number of its run of equal values in ``batch.document``; a run never crosses rows."""
    return batch.document_starts().ravel().cumsum()
