"""Keys and values of the tokens read so far, layer by layer.

A layer keeps what its roles let later tokens see: nothing of a token that skips it. So a cache is as large as the plan
makes it, and :func:`cache_bytes` says how large before it is taken.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.routing.plan import Plan, Role
from megatron_ext.routing.route import LayerRoute


def layer_capacities(plan: Plan, tokens: Sequence[int]) -> list[int]:
    """Keys per row that each layer keeps, at most, of ``tokens`` tokens of each class (by ``class_index``). Of a class
    that a dense share may draw from, room is made for all tokens."""
    drawn = plan.dense_share is not None and plan.dense_share.evaluation > 0
    return [sum(n for n, role in zip(tokens, roles) if drawn or role != Role.SKIP) for roles in plan.roles]


def cache_bytes(capacities: Sequence[int], rows: int, groups: int, head_size: int, element_size: int) -> int:
    """Memory that a cache takes on one rank; ``groups``: key/value heads there."""
    return 2 * sum(capacities) * rows * groups * head_size * element_size


class Cache:
    """Keys and values of ``rows`` documents.

    Attributes:
        lengths: [rows], for each layer; layers with the same roles share theirs.
    """

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
        shape = (groups, head_size)
        self._keys = [torch.zeros(rows, n, *shape, dtype=dtype, device=device) for n in capacities]
        self._values = [torch.zeros(rows, n, *shape, dtype=dtype, device=device) for n in capacities]
        of_roles = {roles: torch.zeros(rows, dtype=torch.int64, device=device) for roles in plan.roles}
        self.lengths = [of_roles[roles] for roles in plan.roles]
        self._longest = {id(lengths): 0 for lengths in self.lengths}

    def advance(self, layers: Sequence[LayerRoute]) -> None:
        """Count the keys of a piece, once it has gone through all layers."""
        done = set()
        for lengths, layer in zip(self.lengths, layers):
            if id(lengths) not in done:
                done.add(id(lengths))
                lengths += torch.bincount(layer.places.key_rows, minlength=lengths.numel())
                self._longest[id(lengths)] = int(lengths.max())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, route: LayerRoute) -> Tensor:
        """Keep the keys and values of a piece, [k, 1, groups, d], and let its queries, [q, 1, heads, d], see them and
        those before them: [q, 1, heads * d]."""
        places, lengths = route.places, self.lengths[layer]
        keys, values = self._keys[layer], self._values[layer]
        slots = lengths[places.key_rows] + places.key_ranks
        keys[places.key_rows, slots] = key.squeeze(1)
        values[places.key_rows, slots] = value.squeeze(1)
        if not query.shape[0]:
            return query.flatten(2)
        longest = min(self._longest[id(lengths)] + places.most_keys, keys.shape[1])
        visible = lengths[places.query_rows] + places.query_visible
        if places.one_each:
            padded, seen = query.transpose(1, 2), visible[:, None]
        else:  # rows of different numbers of queries stand side by side
            rows, most = keys.shape[0], places.most_queries
            first = torch.searchsorted(places.query_rows, torch.arange(rows, device=query.device))
            place = torch.arange(query.shape[0], device=query.device) - first[places.query_rows]
            padded = query.new_zeros(rows, most, *query.shape[2:])
            padded[places.query_rows, place] = query.squeeze(1)
            padded = padded.transpose(1, 2)
            seen = torch.ones(rows, most, dtype=torch.int64, device=query.device)
            seen[places.query_rows, place] = visible
        mask = torch.arange(longest, device=query.device) < seen[..., None]
        output = F.scaled_dot_product_attention(
            padded,
            keys[:, :longest].transpose(1, 2),
            values[:, :longest].transpose(1, 2),
            attn_mask=mask[:, None],
            enable_gqa=padded.shape[1] != keys.shape[2],
        ).transpose(1, 2)
        if places.one_each:
            return output.flatten(2)
        return output[places.query_rows, place].flatten(1).unsqueeze(1)
