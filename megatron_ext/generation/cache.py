"""Keys and values of the tokens read so far, layer by layer.

A layer keeps what its roles let later tokens see: nothing of a token that skips it. So a cache is as large as the plan
makes it, and :func:`cache_bytes` says how large before it is taken.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ext.routing.layer_route import CachePlaces, LayerRoute
from megatron_ext.routing.plan import Plan, Role

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which plans anew for every other number of keys: at every token."""


def layer_capacities(plan: Plan, tokens: Sequence[int]) -> list[int]:
    """Keys per row that each layer keeps, at most, of ``tokens`` tokens of each class (by ``class_index``). Of a class
    that a dense share may draw from, room is made for all tokens."""
    drawn = plan.dense_share is not None and plan.dense_share.evaluation > 0
    return [sum(n for n, role in zip(tokens, roles) if drawn or role != Role.SKIP) for roles in plan.roles]


def cache_bytes(capacities: Sequence[int], rows: int, groups: int, head_size: int, element_size: int) -> int:
    """Memory that a cache takes on one rank; ``groups``: key/value heads there."""
    return 2 * sum(capacities) * rows * groups * head_size * element_size


@dataclass
class _Step:
    """What a piece does in the layers of one kind of roles.

    Attributes:
        rows, slots: where each of its keys goes.
        longest: keys of the longest row, its own included.
        queries: (row, place in it) of each query where the rows differ in their number; None: as many in each.
        width: queries of the longest row.
        mask: the keys that each query sees, bool [rows, 1, width, longest]; None: all, or causal.
        causal: every key of the cache is of this piece, and has a query.
    """

    rows: Tensor
    slots: Tensor
    longest: int
    queries: tuple[Tensor, Tensor] | None
    width: int
    mask: Tensor | None
    causal: bool


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
        # A head's keys stand together, as attention reads them.
        shapes = [(rows, groups, n, head_size) for n in capacities]
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        of_roles = {roles: torch.zeros(rows, dtype=torch.int64) for roles in plan.roles}
        # On the host; layers with the same roles share theirs.
        self._lengths = [of_roles[roles] for roles in plan.roles]
        self._steps: list[_Step] = []

    def begin(self, layers: Sequence[LayerRoute]) -> None:
        """Work out where the queries and keys of a piece belong, before it goes through the layers."""
        device = self._keys[0].device
        made = {id(layer): (layer.places, lengths) for layer, lengths in zip(layers, self._lengths)}
        steps = {key: _step(places, lengths, device) for key, (places, lengths) in made.items()}
        self._steps = [steps[id(layer)] for layer in layers]
        for places, lengths in made.values():
            lengths += places.key_counts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep the keys and values of a piece, [k, 1, groups, d], and let its queries, [q, 1, heads, d], see them and
        those before them: [q, 1, heads * d]."""
        step, keys, values = self._steps[layer], self._keys[layer], self._values[layer]
        keys[step.rows, :, step.slots] = key.squeeze(1)
        values[step.rows, :, step.slots] = value.squeeze(1)
        if not query.shape[0]:
            return query.flatten(2)
        shape = (keys.shape[0], step.width, *query.shape[2:])
        if step.queries is None:
            beside = query.reshape(shape)
        else:
            beside = query.new_zeros(shape)
            beside[step.queries] = query.squeeze(1)
        with nullcontext() if keys.device.type == "cpu" else sdpa_kernel(_KERNELS):
            output = F.scaled_dot_product_attention(
                beside.transpose(1, 2),
                keys[:, :, : step.longest],
                values[:, :, : step.longest],
                attn_mask=step.mask,
                is_causal=step.causal,
                enable_gqa=query.shape[2] != keys.shape[1],
            ).transpose(1, 2)
        output = output.flatten(0, 1) if step.queries is None else output[step.queries]
        return output.flatten(1).unsqueeze(1)


def _step(places: CachePlaces, lengths: Tensor, device: torch.device) -> _Step:
    """Of a piece that comes after ``lengths`` keys of each row."""
    longest = int((lengths + places.key_counts).max())
    width = int(places.query_counts.max())
    even = bool((places.query_counts == width).all())
    causal = width > 1 and not lengths.any() and places.query_rows.numel() == places.key_rows.numel()
    seen = (lengths[places.query_rows] + places.query_visible)[:, None]
    mask = None
    if not causal and not (even and bool((seen == longest).all())):
        mask = torch.ones(lengths.numel(), width, longest, dtype=torch.bool)
        mask[places.query_rows, places.query_ranks] = torch.arange(longest) < seen
        mask = mask.unsqueeze(1).to(device)
    return _Step(
        rows=places.key_rows.to(device),
        slots=(lengths[places.key_rows] + places.key_ranks).to(device),
        longest=longest,
        queries=None if even else (places.query_rows.to(device), places.query_ranks.to(device)),
        width=width,
        mask=mask,
        causal=causal,
    )
