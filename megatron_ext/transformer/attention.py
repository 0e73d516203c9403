"""Attention inside the documents of packed rows."""

import math

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ext.routing.route import Route


class DocumentAttention(torch.nn.Module):
    """Causal attention of every token over the tokens before it in its own document.

    A core-attention module for Megatron-Core's ``SelfAttention``. Work across documents is left out, not masked: each
    document is one call of torch's scaled-dot-product attention.
    """

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
        packed_seq_params: Route | None = None,
    ) -> Tensor:
        """Attention output [t, 1, heads * d] of query [t, 1, heads, d], key and value [t, 1, groups, d]."""
        lengths = packed_seq_params.lengths
        # [t, 1, n, d] -> one [1, n, length, d] view per document
        documents = zip(*(x.permute(1, 2, 0, 3).split(lengths, dim=2) for x in (query, key, value)))
        grouped = query.shape[2] != key.shape[2]
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped)
            for q, k, v in documents
        ]
        output = torch.cat([o.permute(2, 0, 1, 3) for o in outputs])
        return output.reshape(*output.shape[:2], -1)


def transformer_engine_attention() -> type:
    """The same attention by Transformer Engine's kernels: all documents of a micro-batch in one varlen call."""
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
            packed_seq_params: Route | None = None,
        ) -> Tensor:
            """Shapes as :meth:`DocumentAttention.forward`; Transformer Engine's packed format is [t, heads, d]."""
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=packed_seq_params.cu_seqlens_q,
                cu_seqlens_kv=packed_seq_params.cu_seqlens_kv,
                max_seqlen_q=packed_seq_params.max_seqlen_q,
                max_seqlen_kv=packed_seq_params.max_seqlen_kv,
            )
            output = super().forward(
                query.squeeze(1),
                key.squeeze(1),
                value.squeeze(1),
                None,
                attn_mask_type=AttnMaskType.padding_causal,
                packed_seq_params=packed,
            )
            return output.reshape(query.shape[0], 1, -1)

    return TransformerEngineDocumentAttention
