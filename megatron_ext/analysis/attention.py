"""Attention allocation: on which kinds of tokens each layer's attention falls, per task.

For a layer and a set Q of queries (:class:`~megatron_ext.analysis.token_sets.QuerySet`), averaged over the heads and
over Q (arXiv 2606.01503, section 5)::

    left_out        = mean over queries i of  sum over the other visible keys j of attention(i, j)
    mass(C)         = mean over queries i of  sum over counted keys j in C of a(i, j)
    over_uniform(C) = mass(C) / mean over queries i of (counted keys of i in C) / (counted keys of i)
    entropy         = mean over queries i of  - sum over counted keys j of a(i, j) log a(i, j)      in nats
    entropy_share   = mean over queries i with more than one counted key of  entropy(i) / log(counted keys of i)

A query's visible keys are the tokens of its document up to and including itself that do not skip the layer; its counted
keys are those of them that are neither itself nor sinks nor ends (:mod:`~megatron_ext.analysis.token_sets`), and
a(i, j) is the attention of each head over the counted keys alone, which adds up to 1. Queries without a counted key
are left out. Under uniform attention over_uniform is 1 for every class, and entropy_share is 1.

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
from megatron_ext.analysis.scene_objects import object_batches
from megatron_ext.analysis.token_sets import OBJECT_SETS, KeyClass, ObjectTokens, QuerySet, TokenSets
from megatron_ext.data.batch import Batch
from megatron_ext.data.rendering import SpecialTokens
from megatron_ext.errors import UserError
from megatron_ext.generation.checkpoint import load
from megatron_ext.routing.layer_route import LayerRoute
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.route import Route
from megatron_ext.transformer.hidden_states import join
from megatron_ext.transformer.initialization import initialize

BLOCK = 2**23
"""Attention weights computed at a time, over all heads of a rank."""

_ANSWER = {
    "image": (KeyClass.GIVEN_IMAGE, KeyClass.OBJECT),
    "drawn image": (KeyClass.DRAWN_IMAGE,),
    "question": (KeyClass.TEXT,),
    "own answer": (KeyClass.ANSWER,),
    "earlier answers": (KeyClass.EARLIER_ANSWER,),
    "special": (KeyClass.SPECIAL,),
}
_IMAGE = {
    "image": (KeyClass.DRAWN_IMAGE, KeyClass.OBJECT),
    "given image": (KeyClass.GIVEN_IMAGE,),
    "caption": (KeyClass.TEXT,),
    "answer": (KeyClass.ANSWER,),
    "earlier answers": (KeyClass.EARLIER_ANSWER,),
    "special": (KeyClass.SPECIAL,),
}


def _apart(classes: dict[str, tuple[KeyClass, ...]], image: KeyClass) -> dict[str, tuple[KeyClass, ...]]:
    """The classes with the tokens of a query's object apart from the rest of the image."""
    rest = {name: classes for name, classes in classes.items() if name != "image"}
    return {"its object": (KeyClass.OBJECT,), "rest of image": (image,), **rest}


REPORTED = {
    QuerySet.ANSWER: _ANSWER,
    QuerySet.TEXT_AFTER_IMAGE: _ANSWER,
    QuerySet.IMAGE: _IMAGE,
    QuerySet.ANSWER_ABOUT_OBJECT: _apart(_ANSWER, KeyClass.GIVEN_IMAGE),
    QuerySet.IMAGE_OF_OBJECT: _apart(_IMAGE, KeyClass.DRAWN_IMAGE),
}
"""The name of each class of key, by set of queries, and what it holds; figures have those that some query sees."""

DEFINITIONS = {
    "answer": "understanding: queries of the tokens that predict the answer, which are the question's last and the "
    "answer's own",
    "text_after_image": "understanding: queries of all tokens after the first image token that are not image tokens",
    "image": "generation: queries of image tokens, in interleaved documents of those that are drawn",
    "answer_about_object": "queries of answer whose question names an object in the picture; its object: image tokens "
    "that show it",
    "image_of_object": "queries of image that predict an image token that shows an object; its object: earlier image "
    "tokens that show it",
    "left_out": "attention on the query itself, on sinks (the first token of a document and the special tokens right "
    "behind it) and on ends (<eod> and the end of answers), averaged over heads and queries",
    "mass": "sum of the attention on keys of a class among all keys that are not left out, averaged over heads and "
    "queries",
    "over_uniform": "mass divided by the mean share of such keys among those that a query sees and that are not left "
    "out",
    "entropy": "of a query's attention on the keys that are not left out, in nats, averaged over heads and queries",
    "entropy_share": "entropy divided by the logarithm of the number of these keys; queries of one key are left out",
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
        # Per query: mass by class, share of counted keys by class, entropy, entropy share, attention left out, 1, has
        # more than one counted key.
        self._sums = torch.zeros(
            len(model.decoder.layers), len(QuerySet), 2 * len(KeyClass) + 5, dtype=torch.float64, device=self._device
        )
        self._route, self._tokens = None, None
        self._knows_objects = False

    @torch.no_grad()
    def read(self, batch: Batch, objects: ObjectTokens | None = None) -> None:
        """Run the model on [b, s] tokens row by row and accumulate its attention.

        Args:
            objects: the objects of the rows' pictures, for the sets of queries about them; for all batches or for none.
        """
        self._knows_objects = objects is not None
        no_logits = torch.zeros(1, batch.shape[1], dtype=torch.bool)
        host = batch.to("cpu")
        with self._hooked():
            for row in range(batch.shape[0]):
                row_batch = host.rows(row, row + 1)
                tokens = TokenSets.of(row_batch, self._special, objects and objects.rows(row, row + 1))
                self._tokens = TokenSets(*(x.to(self._device) for x in vars(tokens).values()))
                self._route = Route.of(row_batch, self._plan, logit_mask=no_logits).to(self._device)
                self._model(self._route)

    def result(self) -> dict:
        """The allocation over all ranks, by set of queries; collective.

        Each set has its number of "queries", and "layers": for each layer its number of "queries", "mass" and
        "over_uniform" by class of key, "entropy", "entropy_share" and "left_out". A figure without a query, or without
        a counted key, is None.
        """
        sums = self._sums.clone()
        dist.all_reduce(sums)
        sets = [query_set for query_set in QuerySet if self._knows_objects or query_set not in OBJECT_SETS]
        return {query_set.name.lower(): _figures(sums[:, query_set], query_set) for query_set in sets}

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
        """This rank's share of the figures of n queries, [n, 2 * classes + 5].

        Args:
            query, key: [n, heads, d], [k, groups, d].
            query_tokens, key_tokens: flat indices of their tokens.
            visible_keys: [n], each query sees that many of the first keys.
        """
        visible = torch.arange(key.shape[0], device=key.device) < visible_keys[:, None]
        counted = visible & ~self._tokens.left_out[key_tokens] & (key_tokens != query_tokens[:, None])
        number = counted.sum(1)
        scores = torch.einsum("ngrd,kgd->grnk", query.float().unflatten(1, (key.shape[1], -1)), key.float())
        scores = (scores * query.shape[-1] ** -0.5).flatten(0, 1)
        scores, all_scores = (scores.masked_fill(~kept, -torch.inf) for kept in (counted, visible))
        attention = scores.softmax(dim=-1).nan_to_num(0.0)  # [heads, n, k]
        left_out = -torch.expm1(scores.logsumexp(-1) - all_scores.logsumexp(-1))
        left_out, entropy = (x.sum(0).double() / self._heads for x in (left_out, torch.special.entr(attention).sum(-1)))

        key_class = self._key_class(query_tokens, key_tokens)
        zeros = torch.zeros(len(number), len(KeyClass), dtype=torch.float64, device=key.device)
        mass = zeros.scatter_add(1, key_class, attention.double().sum(dim=0) / self._heads)
        # Each rank counts its heads' fraction of what does not depend on the heads.
        rank_fraction = query.shape[1] / self._heads
        share = zeros.scatter_add(1, key_class, counted.double()) / number.clamp(min=1)[:, None] * rank_fraction
        several = number > 1
        entropy_share = torch.where(several, entropy / number.clamp(min=2).log(), 0.0)
        count = torch.full_like(entropy, rank_fraction)
        columns = torch.stack([entropy, entropy_share, left_out, count, several * rank_fraction], dim=1)
        return torch.cat([mass, share, columns], dim=1) * (number > 0)[:, None]

    def _key_class(self, query_tokens: Tensor, key_tokens: Tensor) -> Tensor:
        """The :class:`KeyClass` of k keys to n queries, [n, k], from their flat indices."""
        tokens, queries = self._tokens, query_tokens[:, None]
        key_class = tokens.key_class[key_tokens]
        other_turn = tokens.turn[key_tokens] != tokens.turn[queries]
        key_class = torch.where((key_class == KeyClass.ANSWER) & other_turn, int(KeyClass.EARLIER_ANSWER), key_class)
        of_object = (tokens.shows[key_tokens] & tokens.about[queries]) != 0
        return torch.where(of_object, int(KeyClass.OBJECT), key_class)


def of_checkpoint(
    checkpoint: Path,
    overrides: list[str],
    data: str = "validation",
    count: int = 4,
    rows: int = 8,
    vocabulary: Path | None = None,
    tensor: int | None = None,
    scenes: Path | None = None,
    untrained: bool = False,
) -> dict:
    """The "allocation" of a checkpoint over rows of its run's data, with the data and the definitions.

    Args:
        checkpoint, overrides, vocabulary, tensor: see :func:`~megatron_ext.generation.checkpoint.load`.
        data: ``validation`` or ``train``.
        count, rows: the number of batches, and the rows of each over all processes.
        scenes: the split of the picture world that the data were made from; None: the objects are not known.
        untrained: also measure "untrained_allocation", with the initial weights of this configuration and seed.

    Raises:
        UserError: the checkpoint, an override, the data or the scenes are refused, by name.
    """
    trained = load(checkpoint, overrides, vocabulary, tensor)
    replicas = parallel_state.get_data_parallel_world_size()
    if rows % replicas:
        raise UserError(f"a batch of {rows} rows cannot be split over {replicas} replicas; use a multiple")
    special = SpecialTokens.of(trained.vocabulary)

    def measure(name: str) -> dict:
        if scenes:
            batches = object_batches(trained.config, trained.vocabulary, data, rows, count, scenes)
        else:
            batches = ((batch, None) for batch in run_batches(trained.config, trained.vocabulary, data, rows, count))
        allocation = Allocation(trained.model, trained.plan, special)
        for batch, objects in command_line.progress(batches, total=count, desc=name, unit=" batches"):
            allocation.read(batch, objects)
        return allocation.result()

    numbers = {
        "checkpoint": str(checkpoint),
        "plan": trained.plan.name,
        "data": [f"{source.task}: {source.path}" for source in getattr(trained.config.data, data)],
        "rows": count * rows,
        "sequence_length": trained.config.data.sequence_length,
        "definitions": DEFINITIONS,
        "allocation": measure("attention"),
    }
    if untrained:
        initialize(trained.chunks, trained.config.model, trained.config.training.seed)
        numbers["untrained_allocation"] = measure("attention, untrained")
    return numbers


def _flat_indices(route: Route, layer: LayerRoute) -> tuple[Tensor, Tensor]:
    """Flat indices into the micro-batch of a layer's queries and keys, in attention's order."""
    slices = route.order.split(layer.slices.sizes)
    full, kv_only = (
        join([slices[i] for i in chosen], route.order) for chosen in (layer.slices.full, layer.slices.kv_only)
    )
    queries = full if layer.queries is None else full[layer.queries.index]
    return queries, queries if layer.keys is None else torch.cat([full, kv_only])[layer.keys.index]


def _figures(sums: Tensor, query_set: QuerySet) -> dict:
    """The figures of one set of queries, from its sums [layers, 2 * classes + 5]."""

    def ratio(a: float, b: float) -> float | None:
        return a / b if b else None

    seen = sums[:, len(KeyClass) : 2 * len(KeyClass)].sum(0).tolist()
    classes = {name: members for name, members in REPORTED[query_set].items() if any(seen[c] for c in members)}
    layers = []
    for values in sums.tolist():
        mass, share = values[: len(KeyClass)], values[len(KeyClass) : 2 * len(KeyClass)]
        entropy, entropy_share, left_out, queries, several = values[2 * len(KeyClass) :]
        mass, share = ({name: sum(by[c] for c in members) for name, members in classes.items()} for by in (mass, share))
        layers.append(
            {
                "queries": round(queries),
                "mass": {name: ratio(mass[name], queries) for name in classes},
                "over_uniform": {name: ratio(mass[name], share[name]) for name in classes},
                "entropy": ratio(entropy, queries),
                "entropy_share": ratio(entropy_share, several),
                "left_out": ratio(left_out, queries),
            }
        )
    return {"queries": max(layer["queries"] for layer in layers), "layers": layers}
