"""Keys and values of the tokens read so far, layer by layer.

A layer keeps the keys and values of FULL and KV_ONLY tokens only, so the plan decides how large a cache is;
:func:`cache_bytes` computes its size before it is allocated.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ext.routing.layer_route import CachedLayerRoute, CachePlaces
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.roles import Role

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which makes a new plan for every number of keys: at every token."""


def layer_capacities(plan: Plan, tokens: Sequence[int]) -> list[int]:
    """The largest number of keys per row in each layer, for ``tokens`` tokens of each class (by ``class_index``). A
    dense share may select any token, so then there is room for all."""
    all_tokens = plan.dense_share is not None and plan.dense_share.evaluation > 0
    return [sum(n for n, role in zip(tokens, roles) if all_tokens or role != Role.SKIP) for roles in plan.roles]


def cache_bytes(capacities: Sequence[int], rows: int, groups: int, head_size: int, element_size: int) -> int:
    """Memory of a cache on one rank, in bytes; ``groups``: key/value heads there."""
    return 2 * sum(capacities) * rows * groups * head_size * element_size


@dataclass
class _ChunkLayout:
    """Queries and keys of one chunk of each document, in layers with the same roles.

    Attributes:
        rows, slots: cache row and place in it of each key.
        longest: keys of the longest row, this chunk's included.
        queries: (row, place in it) of each query if rows have different numbers of queries; else None.
        width: queries of the longest row.
        mask: the keys that each query sees, bool [rows, 1, width, longest]; None: all, or causal.
        causal: every key of the cache belongs to this chunk, and has a query.
    """

    rows: Tensor
    slots: Tensor
    longest: int
    queries: tuple[Tensor, Tensor] | None
    width: int
    mask: Tensor | None
    causal: bool

    @classmethod
    def of(cls, places: CachePlaces, lengths: Tensor, device: torch.device) -> "_ChunkLayout":
        """The layout of a chunk that follows ``lengths`` [rows] keys."""
        longest = int((lengths + places.key_counts).max())
        width = int(places.query_counts.max())
        even = bool((places.query_counts == width).all())
        causal = width > 1 and not lengths.any() and places.query_rows.numel() == places.key_rows.numel()
        visible = (lengths[places.query_rows] + places.query_visible)[:, None]
        mask = None
        if not causal and not (even and bool((visible == longest).all())):
            mask = torch.ones(lengths.numel(), width, longest, dtype=torch.bool)
            mask[places.query_rows, places.query_ranks] = torch.arange(longest) < visible
            mask = mask.unsqueeze(1).to(device)
        return cls(
            rows=places.key_rows.to(device),
            slots=(lengths[places.key_rows] + places.key_ranks).to(device),
            longest=longest,
            queries=None if even else (places.query_rows.to(device), places.query_ranks.to(device)),
            width=width,
            mask=mask,
            causal=causal,
        )


class Cache:
    """Keys and values of ``rows`` documents."""

    def __init__(
        self,
        plan: Plan,
        capacities: Sequence[int],
        rows: int,
        groups: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        # A head's keys are contiguous, as attention reads them.
        shapes = [(rows, groups, n, head_size) for n in capacities]
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        lengths = {roles: torch.zeros(rows, dtype=torch.int64) for roles in plan.roles}
        # On the host; layers with the same roles share their lengths.
        self._lengths = [lengths[roles] for roles in plan.roles]
        self._layouts: list[_ChunkLayout] = []

    def begin_chunk(self, routes: Sequence[CachedLayerRoute]) -> None:
        """Compute the places of a chunk's queries and keys, before the chunk goes through the layers."""
        device = self._keys[0].device
        distinct = {id(route): (route.places, lengths) for route, lengths in zip(routes, self._lengths)}
        layouts = {key: _ChunkLayout.of(places, lengths, device) for key, (places, lengths) in distinct.items()}
        self._layouts = [layouts[id(route)] for route in routes]
        for places, lengths in distinct.values():
            lengths += places.key_counts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the keys and values of a chunk, [k, 1, groups, d], and attend from its queries, [q, 1, heads, d], to
        all keys of their documents so far: [q, 1, heads * d]."""
        layout, keys, values = self._layouts[layer], self._keys[layer], self._values[layer]
        keys[layout.rows, :, layout.slots] = key.squeeze(1)
        values[layout.rows, :, layout.slots] = value.squeeze(1)
        if not query.shape[0]:
            return query.flatten(2)
        shape = (keys.shape[0], layout.width, *query.shape[2:])
        if layout.queries is None:
            by_row = query.reshape(shape)
        else:
            by_row = query.new_zeros(shape)
            by_row[layout.queries] = query.squeeze(1)
        with nullcontext() if keys.device.type == "cpu" else sdpa_kernel(_KERNELS):
            output = F.scaled_dot_product_attention(
                by_row.transpose(1, 2),
                keys[:, :, : layout.longest],
                values[:, :, : layout.longest],
                attn_mask=layout.mask,
                is_causal=layout.causal,
                enable_gqa=query.shape[2] != keys.shape[1],
            ).transpose(1, 2)
        output = output.flatten(0, 1) if layout.queries is None else output[layout.queries]
        return output.flatten(1).unsqueeze(1)
