"""Self-attention in which tokens have roles: projections, order of rows and rotary positions around the core."""

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_ext.routing.layer_route import LayerRoute
from megatron_ext.transformer.rotary import apply_rotary, keys_and_values
from megatron_ext.transformer.rows import arrange, restore


class UnifiedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention: queries of FULL tokens against the keys of all but SKIP, inside documents."""

    def forward(self, full: Tensor, kv_only: Tensor | None, norm_weight: Tensor, route: LayerRoute) -> Tensor:
        """Attention output [n, 1, h] of normed hidden states: FULL [n, 1, h] and KV_ONLY [m, 1, h] (or None), each this
        rank's share under sequence parallelism. KV_ONLY ones come without the norm's weight ``norm_weight`` [h]."""
        of = route.pieces
        mixed, of_kv_only = self.linear_qkv(full, of.full_splits, kv_only, of.kv_only_splits, norm_weight)
        # One key/value group after the other, each of its query heads, its key and its value: [n, 1, groups, q + 2, d]
        groups, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        queries = self.num_attention_heads_per_partition // groups
        mixed = mixed.view(-1, 1, groups, queries + 2, d)
        query_table, key_table = route.rotary
        if route.cache is not None and kv_only is None:  # queries and keys of the same rows, turned at once
            mixed = arrange(route.queries, mixed)
            query, key = apply_rotary(mixed[..., :-1, :], key_table.unsqueeze(2)).split([queries, 1], 3)
            output = route.cache.attend(self.layer_number - 1, query.flatten(2, 3), key.squeeze(3), mixed[..., -1, :])
            return self.linear_proj(restore(route.queries, output), of.full_splits)
        query, pairs = mixed.split([queries, 2], 3)
        query = apply_rotary(arrange(route.queries, query), query_table.unsqueeze(2)).flatten(2, 3)
        if kv_only is None:
            key, value = keys_and_values(route.queries, key_table, pairs)
        else:
            key, value = keys_and_values(route.keys, key_table, pairs, of_kv_only.view(-1, 1, groups, 2, d))
        if route.cache is not None:
            output = route.cache.attend(self.layer_number - 1, query, key, value)
            return self.linear_proj(restore(route.queries, output), of.full_splits)
        attend = self.core_attention
        if self.checkpoint_core_attention and self.training:
            attend = self._checkpointed_attention_forward
        output = attend(query, key, value, None, packed_seq_params=route)
        return self.linear_proj(restore(route.queries, output), of.full_splits)
