"""Self-attention of tokens with roles: projections, permutations and rotary positions around the core attention."""

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_ext.transformer.forward_context import ForwardContext
from megatron_ext.transformer.kernels.functions import head_norm, query_key_value, unpermute
from megatron_ext.transformer.key_exchange import query_key_value_of_ranks


class UnifiedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention: FULL tokens attend to the FULL and KV_ONLY tokens of their document."""

    def forward(
        self,
        full: Tensor,
        kv_only: Tensor | None,
        norm_weight: Tensor,
        context: ForwardContext,
        kv_only_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from the FULL rows.

        Args:
            full: normed hidden states [n, 1, h], under sequence parallelism this rank's share.
            kv_only: the same of KV_ONLY rows, [m, 1, h], normed without a weight; None: there are none, or they come as
                ``kv_only_input``.
            norm_weight: [h], that weight.
            kv_only_input: what the call for the layer before returned for the same KV_ONLY rows.

        Returns:
            [n, 1, h], and the ``kv_only_input`` of the next layer.
        """
        layer = self.layer_number - 1
        route = context.routes[layer]
        slices, queries = route.slices, route.queries
        mixed, key_value, kv_only_input = self.linear_qkv(
            full, slices.full_splits, kv_only, slices.kv_only_splits, norm_weight, kv_only_input
        )
        # Per key/value group its query heads, its key and its value: [n, 1, groups, q + 2, d]
        groups, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        mixed = mixed.view(-1, 1, groups, self.num_attention_heads_per_partition // groups + 2, d)
        if key_value is not None:
            key_value = key_value.view(-1, 1, groups, 2, d)
        if self.config.qk_layernorm:
            mixed, key_value = self._normed(mixed, key_value)
        keys, angles = route.keys or queries, context.angles[layer]
        if route.exchange is None:
            query, key, value = query_key_value(mixed, key_value, queries, keys, angles)
        else:
            query, key, value = query_key_value_of_ranks(mixed, key_value, queries, keys, angles, route.exchange)
        if context.attend is not None:
            output = context.attend(layer, query, key, value)
        else:
            attend = self.core_attention
            if self.checkpoint_core_attention and self.training:
                attend = self._checkpointed_attention_forward
            output = attend(query, key, value, None, packed_seq_params=route)
        return self.linear_proj(unpermute(queries, output), slices.full_splits), kv_only_input

    def _normed(self, mixed: Tensor, key_value: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Queries and keys normed over their heads; a key is normed alike, whether of a FULL or a KV_ONLY row."""
        eps, key = self.config.layernorm_epsilon, self.k_layernorm.weight[None]
        query = self.q_layernorm.weight.expand(mixed.shape[3] - 2, -1)
        mixed = head_norm(mixed, torch.cat([query, key]), eps)
        return mixed, None if key_value is None else head_norm(key_value, key, eps)
