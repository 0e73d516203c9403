"""Attention allocation: on which kinds of tokens each layer's attention falls, per task.

For a layer and a set Q of queries (:class:`~megatron_ext.analysis.token_sets.QuerySet`), averaged over the heads and
over Q (arXiv 2606.01503, section 5)::

    mass(C)         = mean over queries i of  sum over keys j in C of attention(i, j)
    over_uniform(C) = mass(C) / mean over queries i of (visible keys of i in C) / (visible keys of i)
    entropy         = mean over queries i of  - sum over j of attention(i, j) log attention(i, j)      in nats
    entropy_share   = mean over queries i with more than one visible key of  entropy(i) / log(visible keys of i)

A query's visible keys are the tokens of its document up to and including itself that do not skip the layer. Under
uniform attention over_uniform is 1 for every class, and entropy_share is 1.

The layer is not modified: a hook on its core attention receives the same query and key tensors, after rotary embedding,
and the segments. The softmax is recomputed in blocks of queries, so no [s, s] matrix is ever kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext import command_line
from megatron_ext.analysis.batches import run_batches
from megatron_ext.analysis.token_sets import KeyClass, QuerySet, TokenSets
from megatron_ext.data.batch import Batch
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.errors import UserError
from megatron_ext.generation.checkpoint import load
from megatron_ext.routing.layer_route import LayerRoute
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.route import Route
from megatron_ext.transformer.hidden_states import join

BLOCK = 2**23
"""Attention weights computed at a time, over all heads of a rank."""

REPORTED = {
    QuerySet.ANSWER: {
        "image": KeyClass.GIVEN_IMAGE,
        "drawn image": KeyClass.DRAWN_IMAGE,
        "question": KeyClass.TEXT,
        "own answer": KeyClass.ANSWER,
        "earlier answers": KeyClass.EARLIER_ANSWER,
        "special": KeyClass.SPECIAL,
    },
    QuerySet.IMAGE: {
        "image": KeyClass.DRAWN_IMAGE,
        "given image": KeyClass.GIVEN_IMAGE,
        "caption": KeyClass.TEXT,
        "answer": KeyClass.ANSWER,
        "earlier answers": KeyClass.EARLIER_ANSWER,
        "special": KeyClass.SPECIAL,
    },
}
REPORTED[QuerySet.TEXT_AFTER_IMAGE] = REPORTED[QuerySet.ANSWER]
"""The name of each class of key, by set of queries."""
INTERLEAVED = {
    QuerySet.ANSWER: ("drawn image",),
    QuerySet.TEXT_AFTER_IMAGE: ("drawn image",),
    QuerySet.IMAGE: ("given image", "answer", "earlier answers"),
}
"""Classes that only interleaved documents have; they are left out if no query sees such a key."""

DEFINITIONS = {
    "answer": "understanding: queries of the tokens that predict the answer, which are the question's last and the "
    "answer's own",
    "text_after_image": "understanding: queries of all tokens after the first image token that are not image tokens",
    "image": "generation: queries of image tokens, in interleaved documents of those that are drawn",
    "mass": "sum of the attention on keys of a class, averaged over heads and queries",
    "over_uniform": "mass divided by the mean share of such keys among those that a query sees (itself included)",
    "entropy": "of a query's attention, in nats, averaged over heads and queries",
    "entropy_share": "entropy divided by the logarithm of the number of keys seen; queries of one key are left out",
}


class Allocation:
    """Running sums over the queries of all batches that a model reads.

    Args:
        model: a whole model, or its slices on the ranks of a tensor-parallel group.
        plan: the roles under which the model reads.
    """

    def __init__(self, model: torch.nn.Module, plan: Plan, special: SpecialTokens):
        self._model, self._plan, self._special = model, plan, special
        self._heads = model.config.num_attention_heads
        self._device = next(model.parameters()).device
        classes = len(KeyClass)
        # Per query: mass by class, share of visible keys by class, entropy, entropy share, 1, sees more than one key.
        self._sums = torch.zeros(
            len(model.decoder.layers), len(QuerySet), 2 * classes + 4, dtype=torch.float64, device=self._device
        )
        self._route, self._tokens = None, None

    @torch.no_grad()
    def read(self, batch: Batch) -> None:
        """Run the model on [b, s] tokens row by row and accumulate its attention."""
        no_logits = torch.zeros(1, batch.shape[1], dtype=torch.bool)
        host = batch.to("cpu")
        with self._hooked():
            for row in range(batch.shape[0]):
                row_batch = host.rows(row, row + 1)
                tokens = TokenSets.of(row_batch, self._special)
                self._tokens = TokenSets(*(x.to(self._device) for x in vars(tokens).values()))
                self._route = Route.of(row_batch, self._plan, logit_mask=no_logits).to(self._device)
                self._model(self._route)

    def result(self) -> dict:
        """The allocation over all ranks, by set of queries; collective.

        Each set has its number of "queries", and "layers": for each layer its number of "queries", "mass" and
        "over_uniform" by class of key, "entropy" and "entropy_share". A figure without a query, or without a visible
        key, is None.
        """
        sums = self._sums.clone()
        dist.all_reduce(sums)
        return {query_set.name.lower(): _figures(sums[:, query_set], query_set) for query_set in QuerySet}

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        for layer in self._model.decoder.layers:

            def hook(module, args, kwargs, number=layer.layer_number - 1):
                self._add_layer(number, args[0].squeeze(1), args[1].squeeze(1), kwargs["packed_seq_params"])

            handles.append(layer.self_attention.core_attention.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_layer(self, layer: int, query: Tensor, key: Tensor, route: LayerRoute) -> None:
        """Add the attention of a layer: query [queries, heads, d], key [keys, groups, d], in attention's order."""
        if not route.query_lengths:
            return
        query_index, key_index = _flat_indices(self._route, route)
        query_segments = (tensor.split(route.query_lengths) for tensor in (query, query_index))
        key_ranges = list(zip(route.key_starts, route.key_lengths))
        key_segments = ([tensor.narrow(0, *rows) for rows in key_ranges] for tensor in (key, key_index))
        for queries, query_tokens, keys, key_tokens in zip(*query_segments, *key_segments):
            members = self._tokens.members[query_tokens]
            selected = members.any(dim=1).nonzero().flatten()
            if selected.numel():
                before = key_tokens.numel() - query_tokens.numel()  # the last query sees all keys
                for block in selected.split(max(1, BLOCK // (query.shape[1] * key_tokens.numel()))):
                    values = self._block(queries[block], query_tokens[block], keys, key_tokens, before + block + 1)
                    self._sums[layer] += members[block].double().T @ values

    def _block(
        self, query: Tensor, query_tokens: Tensor, key: Tensor, key_tokens: Tensor, visible_keys: Tensor
    ) -> Tensor:
        """This rank's share of the figures of n queries, [n, 2 * classes + 4].

        Args:
            query, key: [n, heads, d], [k, groups, d].
            query_tokens, key_tokens: flat indices of their tokens.
            visible_keys: [n], each query sees that many of the first keys.
        """
        scores = torch.einsum("ngrd,kgd->grnk", query.float().unflatten(1, (key.shape[1], -1)), key.float())
        visible = torch.arange(key.shape[0], device=key.device) < visible_keys[:, None]
        attention = (scores * query.shape[-1] ** -0.5).masked_fill_(~visible, -torch.inf).softmax(dim=-1).flatten(0, 1)
        entropy = torch.special.entr(attention).sum(dim=(0, 2)).double() / self._heads

        key_class = self._tokens.key_class[key_tokens].expand(len(visible_keys), -1)
        other_turn = self._tokens.turn[key_tokens] != self._tokens.turn[query_tokens][:, None]
        key_class = torch.where((key_class == KeyClass.ANSWER) & other_turn, int(KeyClass.EARLIER_ANSWER), key_class)
        zeros = torch.zeros(len(visible_keys), len(KeyClass), dtype=torch.float64, device=key.device)
        mass = zeros.scatter_add(1, key_class, attention.double().sum(dim=0) / self._heads)
        # Each rank counts its heads' fraction of what does not depend on the heads.
        rank_fraction = query.shape[1] / self._heads
        share = zeros.scatter_add(1, key_class, visible.double()) / visible_keys[:, None] * rank_fraction
        several = visible_keys > 1
        entropy_share = torch.where(several, entropy / visible_keys.clamp(min=2).log(), 0.0)
        count = torch.full_like(entropy, rank_fraction)
        columns = torch.stack([entropy, entropy_share, count, several * rank_fraction], dim=1)
        return torch.cat([mass, share, columns], dim=1)


def of_checkpoint(
    checkpoint: Path,
    overrides: list[str],
    data: str = "validation",
    count: int = 4,
    rows: int = 8,
    vocabulary: Path | None = None,
    tensor: int | None = None,
) -> dict:
    """The "allocation" of a checkpoint over rows of its run's data, with the data and the definitions.

    Args:
        checkpoint, overrides, vocabulary, tensor: see :func:`~megatron_ext.generation.checkpoint.load`.
        data: ``validation`` or ``train``.
        count, rows: the number of batches, and the rows of each over all processes.

    Raises:
        UserError: the checkpoint, an override or the data is refused, by name.
    """
    trained = load(checkpoint, overrides, vocabulary, tensor)
    replicas = parallel_state.get_data_parallel_world_size()
    if rows % replicas:
        raise UserError(f"a batch of {rows} rows cannot be split over {replicas} replicas; use a multiple")
    allocation = Allocation(trained.model, trained.plan, SpecialTokens.of(trained.vocabulary))
    batches = run_batches(trained.config, trained.vocabulary, data, rows, count)
    for batch in command_line.progress(batches, total=count, desc="attention", unit=" batches"):
        allocation.read(batch)
    return {
        "checkpoint": str(checkpoint),
        "plan": trained.plan.name,
        "data": [f"{source.task}: {source.path}" for source in getattr(trained.config.data, data)],
        "rows": count * rows,
        "sequence_length": trained.config.data.sequence_length,
        "definitions": DEFINITIONS,
        "allocation": allocation.result(),
    }


def _flat_indices(route: Route, layer: LayerRoute) -> tuple[Tensor, Tensor]:
    """Flat indices into the micro-batch of a layer's queries and keys, in attention's order."""
    slices = route.order.split(layer.slices.sizes)
    full, kv_only = (
        join([slices[i] for i in chosen], route.order) for chosen in (layer.slices.full, layer.slices.kv_only)
    )
    queries = full if layer.queries is None else full[layer.queries.index]
    return queries, queries if layer.keys is None else torch.cat([full, kv_only])[layer.keys.index]


def _figures(sums: Tensor, query_set: QuerySet) -> dict:
    """The figures of one set of queries, from its sums [layers, 2 * classes + 4]."""

    def ratio(a: float, b: float) -> float | None:
        return a / b if b else None

    seen = sums[:, len(KeyClass) : 2 * len(KeyClass)].sum(0) > 0
    classes = {
        name: key_class
        for name, key_class in REPORTED[query_set].items()
        if name not in INTERLEAVED[query_set] or seen[key_class]
    }
    layers = []
    for values in sums.tolist():
        mass, share = values[: len(KeyClass)], values[len(KeyClass) : 2 * len(KeyClass)]
        entropy, entropy_share, queries, several = values[2 * len(KeyClass) :]
        layers.append(
            {
                "queries": round(queries),
                "mass": {name: ratio(mass[c], queries) for name, c in classes.items()},
                "over_uniform": {name: ratio(mass[c], share[c]) for name, c in classes.items()},
                "entropy": ratio(entropy, queries),
                "entropy_share": ratio(entropy_share, several),
            }
        )
    return {"queries": max(layer["queries"] for layer in layers), "layers": layers}
