"""Self-attention in which tokens have roles: projections, order of rows and rotary positions around the core."""

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_ext.routing.layer_route import LayerRoute
from megatron_ext.transformer.kernels.functions import query_key_value, unpermute


class UnifiedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention: queries of FULL tokens against the keys of all but SKIP, inside documents."""

    def forward(self, full: Tensor, kv_only: Tensor | None, norm_weight: Tensor, route: LayerRoute) -> Tensor:
        """Attention output [n, 1, h] of normed hidden states: FULL [n, 1, h] and KV_ONLY [m, 1, h] (or None), each this
        rank's share under sequence parallelism. KV_ONLY ones come without the norm's weight ``norm_weight`` [h]."""
        of = route.pieces
        mixed, of_kv_only = self.linear_qkv(full, of.full_splits, kv_only, of.kv_only_splits, norm_weight)
        # One key/value group after the other, each of its query heads, its key and its value: [n, 1, groups, q + 2, d]
        groups, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        mixed, keys = mixed.view(-1, 1, groups, self.num_attention_heads_per_partition // groups + 2, d), route.queries
        if of_kv_only is not None:
            of_kv_only, keys = of_kv_only.view(-1, 1, groups, 2, d), route.keys
        query, key, value = query_key_value(mixed, of_kv_only, route.queries, keys, route.rotary)
        if route.cache is not None:
            output = route.cache.attend(self.layer_number - 1, query, key, value)
            return self.linear_proj(unpermute(route.queries, output), of.full_splits)
        attend = self.core_attention
        if self.checkpoint_core_attention and self.training:
            attend = self._checkpointed_attention_forward
        output = attend(query, key, value, None, packed_seq_params=route)
        return self.linear_proj(unpermute(route.queries, output), of.full_splits)
