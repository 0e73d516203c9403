"""Attention inside the documents of packed rows."""

import math

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ext.routing.route import Route
from megatron_ext.transformer.rotary import apply_rotary


class UnifiedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention over the documents of packed rows.

    Parameters, sharding and activation recomputation are Megatron-Core's; the forward pass turns queries and keys
    together, by a table that is made once for all layers.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Route | None = None,
        **unused,
    ) -> tuple[Tensor, None]:
        """Attention output [t, 1, h] of hidden states [t, 1, h] (their first dimension cut over the tensor-parallel
        group under sequence parallelism).

        Args:
            rotary_pos_emb: table of :func:`~megatron_ext.transformer.rotary.rotary_table` for all t tokens.
            packed_seq_params: where the documents begin and end.
        """
        mixed, _ = self.linear_qkv(hidden_states)
        # One key/value group after the other, each of its query heads, its key and its value: [t, 1, groups, n + 2, d]
        groups, d = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        mixed = mixed.view(*mixed.shape[:2], groups, -1, d)
        turned = apply_rotary(mixed[..., :-1, :], rotary_pos_emb.unsqueeze(2))
        query, key = turned[..., :-1, :].flatten(2, 3), turned[..., -1, :]
        value = mixed[..., -1, :]
        attend = self.core_attention
        if self.checkpoint_core_attention and self.training:
            attend = self._checkpointed_attention_forward
        output = attend(query, key, value, None, packed_seq_params=packed_seq_params)
        return self.linear_proj(output)


class DocumentAttention(torch.nn.Module):
    """Causal attention of every token over the tokens before it in its own document.

    Work across documents is left out, not masked: each document is one call of torch's scaled-dot-product attention.
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
        grouped = query.shape[2] != key.shape[2]
        # Split first and permute then: the pieces stay contiguous in t, so putting them together is a plain copy.
        documents = zip(*(x.split(packed_seq_params.lengths) for x in (query, key, value)))
        outputs = []
        for document in documents:
            q, k, v = (x.permute(1, 2, 0, 3) for x in document)  # [1, n, length, d]
            output = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
            )
            outputs.append(output.permute(2, 0, 1, 3))
        return torch.cat(outputs).flatten(2)


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
