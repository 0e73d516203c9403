"""Attention of queries to keys inside the documents of packed rows: by torch's kernels, or by Transformer Engine's."""

import math
from itertools import groupby

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_ext.routing.layer_route import LayerRoute


class DocumentAttention(torch.nn.Module):
    """Causal attention by torch's kernels: a call for each segment, or for neighbours of one shape together."""

    def __init__(self, config, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **unused):
        super().__init__()
        self.softmax_scale = 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: LayerRoute | None = None,
    ) -> Tensor:
        """Attention output [queries, 1, heads * d] of query [queries, 1, heads, d], key and value [keys, 1, groups, d].

        A segment of q queries and k keys is causal from its end: its last query sees all k keys.
        """
        dtype = query.dtype
        if dtype == torch.bfloat16 and not query.is_cuda:
            # Torch's kernel for CPUs takes longer in bf16 than in float32, there and back included.
            query, key, value = query.float(), key.float(), value.float()
        segments = zip(packed_seq_params.query_lengths, packed_seq_params.key_lengths)
        shapes = [(q, k, len(list(same))) for (q, k), same in groupby(segments)]
        if not shapes:  # nobody asks, yet every weight has a gradient of zero
            return (query.flatten(2) + 0 * (key.sum() + value.sum())).to(dtype)
        queries = query.squeeze(1).split([q * n for q, _, n in shapes])
        keys, values = (x.squeeze(1).split([k * n for _, k, n in shapes]) for x in (key, value))
        outputs = [
            self._attend(*(x.unflatten(0, (n, -1)).transpose(1, 2) for x in pieces), q, k)
            for (q, k, n), *pieces in zip(shapes, queries, keys, values)
        ]
        joined = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])
        return joined.flatten(1).unsqueeze(1).to(dtype)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, q: int, k: int) -> Tensor:
        """[n, heads, q, d] of query [n, heads, q, d], key and value [n, groups, k, d]."""
        options = {"scale": self.softmax_scale, "enable_gqa": query.shape[1] != key.shape[1]}
        if q == k:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        if query.is_cuda:  # these kernels align the mask at the end without making one
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
            bias = causal_lower_right(q, k)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.softmax_scale)
        mask = torch.ones(q, k, dtype=torch.bool).tril_(k - q)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def transformer_engine_attention() -> type:
    """The same attention by Transformer Engine's kernels: all segments of a micro-batch in one varlen call."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class TransformerEngineDocumentAttention(TEDotProductAttention):
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: None,
            attn_mask_type: AttnMaskType | None = None,
            attention_bias: None = None,
            packed_seq_params: LayerRoute | None = None,
        ) -> Tensor:
            """Shapes as :meth:`DocumentAttention.forward`; Transformer Engine's packed format is [t, heads, d]."""
            route = packed_seq_params
            if not route.query_lengths:
                return query.flatten(2) + 0 * (key.sum() + value.sum())
            # Megatron-Core's wrapper has no name for this mask.
            output = super(TEDotProductAttention, self).forward(
                query.squeeze(1),
                key.squeeze(1),
                value.squeeze(1),
                qkv_format="thd",
                attn_mask_type="padding_causal_bottom_right",
                cu_seqlens_q=route.cu_seqlens_q,
                cu_seqlens_kv=route.cu_seqlens_kv,
                max_seqlen_q=max(route.query_lengths),
                max_seqlen_kv=max(route.key_lengths),
            )
            return output.reshape(query.shape[0], 1, -1)

    return TransformerEngineDocumentAttention
