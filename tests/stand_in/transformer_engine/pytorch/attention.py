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
        pad_between_seqs,
    ):
        assert qkv_format == "thd" and attn_mask_type == "padding_causal_bottom_right" and not pad_between_seqs
        repeats = query_layer.shape[1] // key_layer.shape[1]
        lengths = [x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_kv)]
        queries = query_layer[: sum(lengths[0])].split(lengths[0])
        keys, values = (x[: sum(lengths[1])].split(lengths[1]) for x in (key_layer, value_layer))
        outputs = []
        for q, k, v in zip(queries, keys, values):
            k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self._scale
            hidden = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v))
        fillers = query_layer.new_zeros(query_layer.shape[0] - sum(lengths[0]), *query_layer.shape[1:])
        return torch.cat([*outputs, fillers]).flatten(1)
