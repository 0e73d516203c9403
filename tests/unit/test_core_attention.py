"""Attention of segments against a dense masked reference, on the CPU's path and, traced, on the GPU's."""

import inspect
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ext.data.transfer import to_device
from megatron_ext.routing.permutation import Permutation
from megatron_ext.routing.segment_buckets import LONGEST, filled, in_order
from megatron_ext.transformer import core_attention
from megatron_ext.transformer.core_attention import DocumentAttention, causal_options, varlen_attn
from megatron_ext.transformer.kernels.functions import permute, unpermute
from megatron_ext.transformer.segment_keys import with_segment_keys

HEADS, GROUPS, SIZE = 4, 2, 8
SEGMENTS = {
    "documents": [(3, 3), (3, 3), (5, 5)],
    "queries fewer than keys": [(3, 7), (1, 4), (1, 4), (6, 6)],
    "a segment of nothing": [(0, 0), (0, 0), (4, 6), (0, 0)],
    "no query": [],
    "segments of one document": [(3, 3, 0), (2, 9, 0), (4, 15, 0), (5, 5, 15), (1, 4, 20), (2, 8, 20)],
}
"""Queries, keys and, where segments share keys, the first of them; else keys follow those of the segment before."""


def key_starts(segments: list[tuple]) -> list[int]:
    ends = np.cumsum([0, *(k for _, k, *_ in segments)])
    return [start[0] if start else int(end) for (_, _, *start), end in zip(segments, ends)]


def key_count(segments: list[tuple]) -> int:
    return max((start + k for start, (_, k, *_) in zip(key_starts(segments), segments)), default=0)


def route_of(segments: list[tuple], device: str = "cpu") -> SimpleNamespace:
    queries, keys = ([pair[i] for pair in segments] for i in (0, 1))
    lengths = (np.array(x, dtype=int) for x in (queries, keys, key_starts(segments)))
    index = [row for start, (_, k, *_) in zip(key_starts(segments), segments) for row in range(start, start + k)]
    repeat = Permutation.of(np.array(index, dtype=int), [key_count(segments)], repeated=True)
    cumulative = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (queries, keys)]
    return SimpleNamespace(
        query_lengths=queries,
        key_lengths=keys,
        buckets=to_device(in_order(*lengths), torch.device(device)),
        segment_keys=None if key_count(segments) == sum(keys) else to_device(repeat, torch.device(device)),
        cu_seqlens_q=cumulative[0],
        cu_seqlens_kv=cumulative[1],
        max_query_length=64,
        max_key_length=64,
    )


def rows(segments: list[tuple[int, int]], fillers: int, size: int = SIZE, **options) -> list[Tensor]:
    """Query, key and value of the segments, followed by filler rows; all require gradients."""
    torch.manual_seed(0)
    queries, keys = sum(pair[0] for pair in segments) + fillers, key_count(segments) + fillers
    shapes = (queries, HEADS), (keys, GROUPS), (keys, GROUPS)
    tensors = [torch.randn(n, 1, heads, size, dtype=torch.float64).to(**options) for n, heads in shapes]
    return [x.requires_grad_() for x in tensors]


def dense(query: Tensor, key: Tensor, value: Tensor, segments: list[tuple[int, int]]) -> Tensor:
    """Every query against every key, with a mask of the keys that it sees; fillers see none."""
    visible = torch.zeros(query.shape[0], key.shape[0], dtype=torch.bool)
    first = 0
    for (q, k, *_), begin in zip(segments, key_starts(segments)):
        for i in range(q):
            visible[first + i, begin : begin + k - q + i + 1] = True
        first += q
    key, value = (x.squeeze(1).repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    scores = torch.einsum("qnd,knd->nqk", query.squeeze(1), key) / SIZE**0.5
    share = scores.masked_fill(~visible, -1e9).softmax(-1) * visible
    return torch.einsum("nqk,knd->qnd", share, value).flatten(1).unsqueeze(1)


def assert_equal_with_gradients(
    output: Tensor, expected: Tensor, inputs: list[Tensor], references: list[Tensor]
) -> None:
    """Outputs, and the gradients of ``inputs`` and ``references`` that a random weighting of them gives."""
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for tensor, reference in zip(inputs, references):
        torch.testing.assert_close(tensor.grad, reference.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fillers", [0, 3])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_outputs_and_gradients_equal_dense_masked_attention(segments, fillers):
    inputs, reference_inputs = rows(segments, fillers), rows(segments, fillers)
    output = DocumentAttention()(*inputs, None, packed_seq_params=route_of(segments))
    assert_equal_with_gradients(output, dense(*reference_inputs, segments), inputs, reference_inputs)


def arrays(segments: list[tuple]) -> list[np.ndarray]:
    """Queries, keys and first keys of segments."""
    return [np.array(x) for x in (*zip(*(pair[:2] for pair in segments)), key_starts(segments))]


def in_buckets(segments: list[tuple]) -> SimpleNamespace:
    """The buckets of segments, with their order as permutations of queries and of keys."""
    lengths = arrays(segments)
    order, total = filled(*lengths), key_count(segments)
    queries = Permutation.of(order.query_index, [lengths[0].sum()])
    keys = Permutation.of(order.key_index, [total], repeated=total < lengths[1].sum())
    queries, keys, buckets = to_device([queries, keys, order.buckets], torch.device("cpu"))
    return SimpleNamespace(query_lengths=lengths[0].tolist(), buckets=buckets, queries=queries, keys=keys)


BUCKETED = {
    "documents": [(n, n) for n in (3, 14, 3, 15, 13, 40, 3, 16, 39)],
    "queries fewer than keys": [(3, 7), (1, 5), (2, 6), (6, 6), (14, 44), (13, 41), (5, 5), (13, 44)],
    "one query each": [(1, k) for k in (20, 21, 20, 19, 21)],
    "long ones stay alone": [(n, n) for n in (130, 131, 130, *10 * [12, 13])],
    "documents of many segments": [
        *((9, 30 * (i + 1), 0) for i in range(16)),
        *((9, 30 * (i + 1), 480) for i in range(16)),
        *((n, n, 750 + 20 * n) for n in (11, 12, 13, 14)),
    ],
}


@pytest.mark.parametrize("segments", BUCKETED.values(), ids=BUCKETED)
def test_segments_in_buckets_equal_dense_masked_attention(segments):
    inputs, reference_inputs = rows(segments, 0), rows(segments, 0)
    route = in_buckets(segments)
    assert len(route.buckets) < len(in_order(*arrays(segments)))
    query, key, value = (permute(p, x) for p, x in zip((route.queries, route.keys, route.keys), inputs))
    output = unpermute(route.queries, DocumentAttention()(query, key, value, None, packed_seq_params=route))
    assert_equal_with_gradients(output, dense(*reference_inputs, segments), inputs, reference_inputs)


@pytest.mark.parametrize("seed", range(20))
def test_buckets_hold_every_row_once_and_few_fillers(seed):
    random = np.random.default_rng(seed)
    queries = random.integers(1, 50, 120)
    keys = queries + random.choice([0, 12], 120)
    order = filled(queries, keys, keys.cumsum() - keys)
    for index, lengths in ((order.query_index, queries), (order.key_index, keys)):
        assert np.array_equal(np.sort(index[index >= 0]), np.arange(lengths.sum()))
        assert index.size < 1.2 * lengths.sum()
    # Within a bucket a segment is one stretch of consecutive rows, then fillers.
    starts, place = set((queries.cumsum() - queries).tolist()), 0
    for bucket in order.buckets:
        for _ in range(bucket.segments):
            segment = order.query_index[place : place + bucket.queries]
            real = segment[segment >= 0]
            assert real[0] in starts and np.array_equal(segment[: real.size], real) and (np.diff(real) == 1).all()
            place += bucket.queries


def test_nothing_is_filled_where_it_saves_few_calls():
    for queries, keys in (([12, 12, 12],) * 2, ([12, 40], [48, 40]), ([100, 30, 100],) * 2, ([], [])):
        queries, keys = np.array(queries, dtype=int), np.array(keys, dtype=int)
        assert filled(queries, keys, keys.cumsum() - keys) is None


def test_documents_of_many_segments_have_their_long_ranges_of_keys_once():
    segments = BUCKETED["documents of many segments"]
    order = filled(*arrays(segments))
    short = sum(k for _, k, *_ in segments if k <= LONGEST)
    assert order.key_index.size <= key_count(segments) + 1.2 * short < 0.5 * sum(k for _, k, *_ in segments)


def test_a_kernel_that_wants_repeated_keys_keeps_them_once():
    segments = SEGMENTS["segments of one document"]
    inputs, reference_inputs = rows(segments, 3), rows(segments, 3)
    repeated = []

    class Kernel(torch.autograd.Function):
        """Every segment against keys of its own; saves what it is given, as flash attention does."""

        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            repeated.extend(weakref.ref(x.untyped_storage()) for x in tensors[1:])
            return Kernel.attention(*tensors)

        @staticmethod
        def attention(query, key, value):
            return dense(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), [pair[:2] for pair in segments])

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                tensors = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return torch.autograd.grad(Kernel.attention(*tensors), tensors, grad)

    output = with_segment_keys(Kernel.apply, *(x.squeeze(1) for x in inputs), route_of(segments).segment_keys)
    assert len(repeated) == 2 and not any(storage() for storage in repeated)
    assert_equal_with_gradients(output, dense(*reference_inputs, segments), inputs, reference_inputs)


def test_bfloat16_on_the_cpu_comes_back_as_bfloat16():
    segments = SEGMENTS["queries fewer than keys"]
    output = DocumentAttention()(*rows(segments, 0, dtype=torch.bfloat16), None, packed_seq_params=route_of(segments))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), dense(*rows(segments, 0), segments), rtol=0, atol=3e-2)


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(varlen_attn is None, reason="this torch has no variable-length attention")
def test_half_precision_off_the_cpu_is_one_variable_length_call():
    segments = SEGMENTS["queries fewer than keys"]
    inputs = rows(segments, 3, device="meta", dtype=torch.bfloat16)
    with Seen() as seen:
        output = DocumentAttention()(*inputs, None, packed_seq_params=route_of(segments))
        output.sum().backward()
    assert output.shape == (inputs[0].shape[0], 1, HEADS * SIZE)
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]
    calls = [name for name in seen.names if "varlen" in name]
    assert calls == ["torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"]
    assert not any("scaled_dot_product" in name for name in seen.names)


@pytest.mark.parametrize("size, dtype", [(SIZE, torch.float32), (6, torch.bfloat16), (264, torch.bfloat16)])
def test_segments_that_flash_attention_cannot_compute_are_computed_singly(size, dtype):
    segments = SEGMENTS["queries fewer than keys"]
    inputs = rows(segments, 3, size, device="meta", dtype=dtype)
    with Seen() as seen:
        output = DocumentAttention()(*inputs, None, packed_seq_params=route_of(segments, "meta"))
        output.sum().backward()
    assert output.shape == (inputs[0].shape[0], 1, HEADS * size)
    assert not any("varlen" in name for name in seen.names)


def test_an_old_torch_goes_segment_by_segment(monkeypatch):
    monkeypatch.setattr(core_attention, "varlen_attn", None)
    segments = SEGMENTS["documents"]
    inputs = rows(segments, 0, device="meta", dtype=torch.bfloat16)
    assert DocumentAttention()(*inputs, None, packed_seq_params=route_of(segments, "meta")).shape == (
        11,
        1,
        HEADS * SIZE,
    )


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """As of torch 2.11."""


def varlen_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """As of torch 2.13."""


@pytest.mark.parametrize("version", [varlen_2_11, varlen_2_13])
def test_the_call_fits_this_version_and_is_causal(version, monkeypatch):
    calls = []

    def record(*args, **kwargs):
        calls.append(inspect.signature(version).bind(*args, **kwargs).arguments)
        return args[0]

    segments = SEGMENTS["documents"]
    monkeypatch.setattr(core_attention, "varlen_attn", record)
    monkeypatch.setattr(core_attention, "_CAUSAL", causal_options(version))
    inputs = rows(segments, 0, device="meta", dtype=torch.bfloat16)
    DocumentAttention()(*inputs, None, packed_seq_params=route_of(segments))
    (call,) = calls
    assert call["window_size"] == (-1, 0)  # which varlen_attn takes for causal
    assert call.get("enable_gqa", True)
    assert (call["max_q"], call["max_k"]) == (64, 64)
    assert call["cu_seq_q"].dtype == torch.int32 and call["query"].shape == (11, HEADS, SIZE)
