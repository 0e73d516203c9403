"""Attention inside the documents of packed rows, by torch's kernels or by Transformer Engine's.

All take query [queries, 1, heads, d], key and value [keys, 1, groups, d] and a
:class:`~megatron_ext.routing.layer_route.LayerRoute`, and return [queries, 1, heads * d]. A segment of q queries and k
keys is causal from its end: its last query sees all k keys (bottom-right aligned). Rows after the last segment are
fillers, whose outputs are not used.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ext.routing.layer_route import LayerRoute
from megatron_ext.routing.segment_buckets import Bucket
from megatron_ext.transformer.hidden_states import join
from megatron_ext.transformer.segment_keys import with_segment_keys

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None


class DocumentAttention(torch.nn.Module):
    """Causal attention by torch's kernels: one variable-length call for all segments on a GPU in half precision; else a
    call per bucket of segments."""

    def __init__(self, **unused):
        super().__init__()

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
        """[queries, 1, heads * d]"""
        route = packed_seq_params
        if not route.query_lengths:
            return no_attention(query, key, value)
        if varlen_supports(query.device.type, query.dtype, query.shape[-1]):
            return _varlen_attention(query, key, value, route)
        return _bucket_attention(query, key, value, route.buckets)


def no_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The result without segments: zeros [queries, 1, heads * d], through which every weight has a gradient of zero."""
    return 0 * (query.flatten(2) + key.sum() + value.sum())


def varlen_supports(device_type: str, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch's variable-length attention fits: it is flash attention, for GPUs and half precision only."""
    half = dtype in (torch.bfloat16, torch.float16)
    return varlen_attn is not None and device_type != "cpu" and half and head_size % 8 == 0 and head_size <= 256


def causal_options(call: Callable) -> dict:
    """The options that make a version of ``varlen_attn`` causal and let query heads share keys.

    Flash attention aligns the mask at the bottom right in all versions. Checked against torch 2.11, which needs no
    option for grouped heads, and 2.13.
    """
    parameters = inspect.signature(call).parameters
    options = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    return options | ({"enable_gqa": True} if "enable_gqa" in parameters else {})


_CAUSAL = causal_options(varlen_attn) if varlen_attn else {}


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, route: LayerRoute) -> Tensor:
    lengths = route.cu_seqlens_q, route.cu_seqlens_kv, route.max_query_length, route.max_key_length

    def attend(*rows: Tensor) -> Tensor:
        return varlen_attn(*rows, *lengths, **_CAUSAL)

    output = with_segment_keys(attend, query.squeeze(1), key.squeeze(1), value.squeeze(1), route.segment_keys)
    return output.flatten(1).unsqueeze(1)


def _bucket_attention(query: Tensor, key: Tensor, value: Tensor, buckets: list[Bucket]) -> Tensor:
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu":
        # Torch's kernel for CPUs is slower in bf16 than in float32, even with both conversions.
        query, key, value = query.float(), key.float(), value.float()
    queries = _split(query, [bucket.segments * bucket.queries for bucket in buckets])
    ranges = [(bucket.key_start, bucket.segments * bucket.keys) for bucket in buckets]
    keys, values = (_key_slices(x, ranges) for x in (key, value))
    outputs = []
    for bucket, *rows in zip(buckets, queries, keys, values):
        heads_first = (x.unflatten(0, (bucket.segments, -1)).transpose(1, 2) for x in rows)
        outputs.append(_attend(*heads_first, bucket).transpose(1, 2).flatten(0, 1))
    outputs += [torch.zeros_like(fillers) for fillers in queries[len(buckets) :]]
    return join(outputs, outputs[0]).flatten(1).unsqueeze(1).to(dtype)


def _split(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    """``rows`` [n, 1, heads, d] as consecutive slices [size, heads, d], the last of them fillers, if any. A single
    slice is not split, which saves concatenating gradients."""
    rows, fillers = rows.squeeze(1), rows.shape[0] - sum(sizes)
    sizes = [*sizes, fillers] if fillers else sizes
    return [rows] if len(sizes) == 1 else list(rows.split(sizes))


def _key_slices(rows: Tensor, ranges: list[tuple[int, int]]) -> Sequence[Tensor]:
    """The ``ranges`` (first row, rows) of keys or values [n, 1, groups, d], [size, groups, d] each."""
    ends = [0, *(start + size for start, size in ranges)]
    if all(start == end for (start, _), end in zip(ranges, ends)):
        return _split(rows, [size for _, size in ranges])
    return _OverlappingSlices.apply(rows.squeeze(1), ranges)


class _OverlappingSlices(torch.autograd.Function):
    """Views of rows, whose gradients are summed into one buffer: one of its own for each slice would make the backward
    pass of a document with many segments quadratic."""

    @staticmethod
    def forward(ctx, rows: Tensor, ranges: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.ranges, ctx.shape = ranges, rows.shape
        return tuple(rows.narrow(0, *part) for part in ranges)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        total = grads[0].new_zeros(ctx.shape, dtype=wide)
        for part, grad in zip(ctx.ranges, grads):
            total.narrow(0, *part).add_(grad)
        return total.to(grads[0].dtype), None


def _attend(query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
    """[n, heads, q, d] of query [n, heads, q, d], key and value [n, groups, k, d]."""
    if query.device.type != "cpu":  # with unequal heads these kernels would write out all scores
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    mask = None
    if bucket.offsets is not None:
        last = bucket.offsets[:, None, None, None] + torch.arange(bucket.queries, device=query.device)[:, None]
        mask = torch.arange(bucket.keys, device=query.device) <= last
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def transformer_engine_attention() -> type:
    """The same attention by Transformer Engine's kernels: all segments of a micro-batch in one call.

    Without flash-attn that is cuDNN's fused attention (from cuDNN 9.6, on Hopper or newer). It makes a new plan for
    every number of segments and every maximum length, so the route rounds both up. Segments may be empty; before cuDNN
    9.7 maxima must be multiples of 64.
    """
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
            """[queries, 1, heads * d]; Transformer Engine's packed format is [t, heads, d]."""
            route = packed_seq_params
            if not route.query_lengths:
                return no_attention(query, key, value)
            attend = partial(
                super(TEDotProductAttention, self).forward,  # Megatron-Core's wrapper has no name for this mask
                qkv_format="thd",
                attn_mask_type="padding_causal_bottom_right",
                cu_seqlens_q=route.cu_seqlens_q,
                cu_seqlens_kv=route.cu_seqlens_kv,
                max_seqlen_q=route.max_query_length,
                max_seqlen_kv=route.max_key_length,
                # Segments are contiguous; otherwise Transformer Engine would check on the device.
                pad_between_seqs=False,
            )
            rows = (x.squeeze(1) for x in (query, key, value))
            return with_segment_keys(attend, *rows, route.segment_keys).reshape(query.shape[0], 1, -1)

    return TransformerEngineDocumentAttention
