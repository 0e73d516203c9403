"""Activation memory of a plan: the elements of a micro-batch that layers keep until its backward pass.

Elements that a layer keeps in one process, hidden size h, query width a (heads times head size), key/value width g, FFN
width f, n query heads and m key/value heads::

    every token    h                          the layer's whole input, where its roles differ from the layer before: the
                                              rows that take part are slices of it
    KV_ONLY        2*g                        key and value, once for all segments of attention that see them
                   h + 1                      normed input and norm, where roles differ from the layer before: rows that
                                              do not change are normed once
    FULL           4*h + 3*a + 2*g + 3*f      input, normed inputs (2*h), residual; query, attention's output as
                   + n + 2                    computed and as put together (3*a); key and value; gate, up and their
                                              product; softmax sums; norms. An input that is a slice is kept once
    a token        r                          for each low-rank delta that it uses

and with norms of queries and keys (``model.qk_norm``)::

    KV_ONLY        2*g + m                    key and value before the norm; norms
    FULL           a + 2*g + n + m            query, key and value before the norm; norms

A layer also keeps the matrices that it computes for a micro-batch: the sums W + D with full-rank deltas, and, where
tokens are KV_ONLY, the key/value rows of its qkv matrices, without and with the norm's weight. Selective recomputation
drops attention's output as computed and the softmax sums; full recomputation keeps only the layer's input.

Left out: rotary tables (shared by the layers); attention masks on CPUs; keys repeated there in buckets of short
segments; copies of rows that a layer needs together but the stored order keeps apart; embedding, logits and loss.

On t tensor-parallel ranks a, g, f and n, and the matrices, are a t-th. Under sequence parallelism so are h and the
norms (of the input, the residual stream and the normed inputs), except where a product gathers rows beforehand and
keeps what it gathered: the normed input of split projections, and of qkv in layers with KV_ONLY rows. The normed
KV_ONLY rows are kept whole too (h), where roles differ from the layer before: later layers take what was gathered.
Without sequence parallelism that layer puts FULL and KV_ONLY rows together in a copy (h).

The projector of image tokens of several codes keeps of each the sum of its code vectors, of width e, and what is before
and after GELU::

    an image token e + 2*h

The depth head keeps for each of the D places of a predicted token, with a width of E, n heads and K codes in the
codebook::

    a layer        16*E + n + 4               inputs of two norms and normed (4*E); query, key and value (3*E);
                                              attention's output; FFN before and after GELU (8*E); softmax sums; norms
    the end        2*E + 2 + K                input of the norm and normed, norm, probabilities in float32

of the tokens of a chunk (``image_codes.head.chunk``), or of all of them. On t tensor-parallel ranks queries, keys and
values, attention's output, the FFN, softmax sums and probabilities are a t-th; every rank has all rows.
"""

from collections.abc import Collection
from typing import Literal

from megatron_ext.config import ModelConfig
from megatron_ext.routing.flops import Counts, key_width, low_rank_modules, projection_shapes, query_width
from megatron_ext.routing.image_code_costs import codebook_size, vector_width
from megatron_ext.routing.plan import Plan, Projections
from megatron_ext.routing.roles import Role

_ROW_PARALLEL = ("proj", "fc2")


def activation_bytes(
    model: ModelConfig,
    plan: Plan,
    counts: Counts,
    element_size: int,
    times: float = 1,
    recompute: Literal["none", "selective", "full"] = "none",
    tensor: int = 1,
    sequence: bool = False,
    first: Collection[int] = (0,),
) -> list[int]:
    """Bytes that each layer keeps of a micro-batch on one tensor-parallel rank.

    Args:
        element_size: bytes of an element; 4 for float32, 2 for bf16.
        times: how many times the micro-batch holds the counted tokens.
        recompute: ``training.recompute``.
        tensor: t, tensor-parallel ranks.
        sequence: whether they share the rows (sequence parallelism).
        first: the layers whose input is one tensor, whatever their roles: the first of each part of the model.
    """
    h, g, ranks = model.hidden_size, 2 * key_width(model) / tensor, tensor if sequence else 1
    elements = []
    for number, (roles, before) in enumerate(zip(plan.roles, [None, *plan.roles])):
        of_role = {role: sum(n for n, r in zip(counts.tokens, roles) if r == role) for role in Role}
        full, kv_only = of_role[Role.FULL], of_role[Role.KV_ONLY]
        changed = roles != before or number in first
        kept = h / ranks * (sum(counts.tokens) if changed or recompute == "full" else full)
        if recompute != "full":
            kept += kv_only * g
            if changed:
                kept += kv_only * ((h + 1) / ranks + (h if tensor > 1 else 0))
            kept += full * _full(model, plan.projections, recompute == "selective", kv_only > 0, tensor, ranks)
            if model.qk_norm:
                pairs, heads = g + model.num_query_groups / tensor, model.num_attention_heads / tensor
                kept += kv_only * pairs + full * (pairs + query_width(model) / tensor + heads)
            for index, (n, role) in enumerate(zip(counts.tokens, roles)):
                modules = low_rank_modules(plan.projections, index, role)
                kept += n * sum((plan.projections.rank or 0) / (tensor if m in _ROW_PARALLEL else 1) for m in modules)
        matrices = 0 if recompute == "full" else _matrices(model, plan.projections, kv_only > 0) / tensor
        elements.append(times * kept + matrices)
    return [round(element_size * n) for n in elements]


def projector_bytes(model: ModelConfig, counts: Counts, element_size: int, times: float = 1, ranks: int = 1) -> int:
    """Bytes that the projector keeps of a micro-batch that holds the counted tokens ``times`` times, on one of
    ``ranks`` that share the rows (sequence parallelism)."""
    width = vector_width(model)
    kept = 0 if width is None else width + 2 * model.hidden_size
    return round(element_size * times * counts.images * kept / ranks)


def depth_head_bytes(model: ModelConfig, counts: Counts, element_size: int, times: float = 1, tensor: int = 1) -> int:
    """Bytes that the depth head keeps of a micro-batch that holds the counted tokens ``times`` times, on one of
    ``tensor`` tensor-parallel ranks."""
    if model.image_codes.depth == 1:
        return 0
    depth, head = model.image_codes.depth, model.image_codes.head
    tokens = times * counts.codes
    if head.chunk:
        tokens = min(tokens, head.chunk)
    layer = 4 * head.hidden_size + 4 + (12 * head.hidden_size + head.num_attention_heads) / tensor
    place = element_size * (head.num_layers * layer + 2 * head.hidden_size + 2) + 4 * codebook_size(model) / tensor
    return round(tokens * depth * place)


def _full(
    model: ModelConfig, projections: Projections, without_core: bool, kv_only: bool, tensor: int, ranks: int
) -> float:
    """Elements that a FULL row keeps beside its input."""
    h, a = model.hidden_size, query_width(model)
    core = 0 if without_core else a + model.num_attention_heads
    split = projections.modules if projections.components else ()
    gathered = [module in split or (module == "qkv" and kv_only) for module in ("qkv", "fc1")]
    whole_rows = h / ranks + sum(h if whole else h / ranks for whole in gathered) + 2 / ranks
    return whole_rows + (2 * a + core + 2 * key_width(model) + 3 * model.ffn_hidden_size) / tensor


def _matrices(model: ModelConfig, projections: Projections, kv_only: bool) -> int:
    """Elements of the matrices that are computed from parameters, as sums or rows of them."""
    h, kv_rows, rank, components = (
        model.hidden_size,
        2 * key_width(model),
        projections.rank,
        len(projections.components),
    )
    shapes = projection_shapes(model)
    elements = 0
    if projections.kind == "delta" and rank is None:
        elements += components * sum(i * o for i, o in (shapes[module] for module in projections.modules))
    if kv_only:
        own = components if "qkv" in projections.modules else 0
        elements += 2 * kv_rows * h + own * (2 * kv_rows * h if rank is None else rank * (kv_rows + h))
    return elements
