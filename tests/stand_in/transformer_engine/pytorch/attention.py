"""Attention of packed documents, segment by segment, aligned at the bottom right."""

import math

import torch


class DotProductAttention(torch.nn.Module):
    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, softmax_scale=None, **unused):
        super().__init__()
        self._scale = softmax_scale or 1 / math.sqrt(kv_channels)

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        qkv_format,
        cu_seqlens_q,
        cu_seqlens_kv,
        max_seqlen_q,
        max_seqlen_kv,
        attn_mask_type,
    ):
        assert qkv_format == "thd" and attn_mask_type == "padding_causal_bottom_right"
        repeats = query_layer.shape[1] // key_layer.shape[1]
        cuts = [x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_kv)]
        made = []
        for q, k, v in zip(query_layer.split(cuts[0]), key_layer.split(cuts[1]), value_layer.split(cuts[1])):
            k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self._scale
            later = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
            made.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -math.inf).softmax(-1), v))
        return torch.cat(made).flatten(1)
