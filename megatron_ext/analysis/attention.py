"""Attention allocation: on which kinds of tokens each layer's attention falls, per task.

For a layer and a set Q of queries (:class:`~megatron_ext.analysis.token_sets.QuerySet`), averaged over heads and over
Q (arXiv 2606.01503, section 5)::

    mass(C)         = mean over queries i of  sum over keys j in C of attention(i, j)
    over_uniform(C) = mass(C) / mean over queries i of (visible keys of i in C) / (visible keys of i)
    entropy         = mean over queries i of  - sum over j of attention(i, j) log attention(i, j)      in nats
    entropy_share   = mean over queries i with more than one visible key of  entropy(i) / log(visible keys of i)

A query's visible keys are those of its document up to itself, itself included, that do not skip the layer. Uniform
attention has over_uniform 1 for every class, and entropy_share 1.

The layer is left as it is: a hook on the module that attends is given the query and key tensors that it is given, after
rotary, and the segments. Their softmax is computed once more, in blocks of queries, so that no [s, s] is ever kept.
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
"""Attention weights computed at a time, of all heads of a rank together."""

REPORTED = {
    QuerySet.ANSWER: {
        "image": KeyClass.IMAGE,
        "question": KeyClass.TEXT,
        "own answer": KeyClass.ANSWER,
        "earlier answers": KeyClass.EARLIER_ANSWER,
        "special": KeyClass.SPECIAL,
    },
    QuerySet.IMAGE: {"image": KeyClass.IMAGE, "caption": KeyClass.TEXT, "special": KeyClass.SPECIAL},
}
REPORTED[QuerySet.TEXT_AFTER_IMAGE] = REPORTED[QuerySet.ANSWER]

DEFINITIONS = {
    "answer": "understanding: queries of the tokens that predict the answer, which are the question's last and the "
    "answer's own",
    "text_after_image": "understanding: queries of all tokens after the first image token that are not image tokens",
    "image": "generation: queries of image tokens",
    "mass": "sum of the attention on keys of a class, averaged over heads and queries",
    "over_uniform": "mass divided by the mean share of such keys among those that a query sees (itself included)",
    "entropy": "of a query's attention, in nats, averaged over heads and queries",
    "entropy_share": "entropy divided by the logarithm of the number of keys seen; queries of one key are left out",
}


class Allocation:
    """Running sums over the queries of everything that a model reads while it is observed.

    Args:
        model: a whole model, or its slices on the ranks of a tensor-parallel group.
        plan: the roles that it is used with.
    """

    def __init__(self, model: torch.nn.Module, plan: Plan, special: SpecialTokens):
        self._model, self._plan, self._special = model, plan, special
        self._heads = model.config.num_attention_heads
        self._device = next(model.parameters()).device
        classes = len(KeyClass)
        # Of each query: mass by class, share of visible keys by class, entropy, entropy share, 1, more than one key.
        self._sums = torch.zeros(
            len(model.decoder.layers), len(QuerySet), 2 * classes + 4, dtype=torch.float64, device=self._device
        )
        self._route, self._tokens = None, None

    @torch.no_grad()
    def read(self, batch: Batch) -> None:
        """Let the model read rows of [b, s] tokens, one after the other, and add up where it looks."""
        nowhere = torch.zeros(1, batch.shape[1], dtype=torch.bool)
        host = batch.to("cpu")
        with self._observing():
            for row in range(batch.shape[0]):
                part = host.rows(row, row + 1)
                tokens = TokenSets.of(part, self._special)
                self._tokens = TokenSets(*(x.to(self._device) for x in vars(tokens).values()))
                self._route = Route.of(part, self._plan, wanted=nowhere).to(self._device)
                self._model(self._route)

    def result(self) -> dict:
        """Figures over all ranks; collective. By set of queries: how many "queries" they are, and for each layer the
        "queries" that it had, "mass" and "over_uniform" by class of key, "entropy" and "entropy_share". What has no
        query, or no visible key, is None."""
        sums = self._sums.clone()
        dist.all_reduce(sums)
        return {of.name.lower(): _figures(sums[:, of], REPORTED[of]) for of in QuerySet}

    @contextmanager
    def _observing(self) -> Iterator[None]:
        hooks = []
        for layer in self._model.decoder.layers:

            def look(module, args, kwargs, number=layer.layer_number - 1):
                self._look(number, args[0].squeeze(1), args[1].squeeze(1), kwargs["packed_seq_params"])

            hooks.append(layer.self_attention.core_attention.register_forward_pre_hook(look, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, layer: int, query: Tensor, key: Tensor, route: LayerRoute) -> None:
        """Add up one layer: query [queries, heads, d], key [keys, groups, d] in attention's order."""
        if not route.query_lengths:
            return
        rows = _flat_rows(self._route, route)
        segments = (
            x.split(lengths)
            for lengths, of in ((route.query_lengths, (query, rows[0])), (route.key_lengths, (key, rows[1])))
            for x in of
        )
        for query_piece, asking, key_piece, asked in zip(*segments):
            members = self._tokens.members[asking]
            chosen = members.any(dim=1).nonzero().flatten()
            if chosen.numel():
                before = asked.numel() - asking.numel()  # the last query sees all keys
                for some in chosen.split(max(1, BLOCK // (query.shape[1] * asked.numel()))):
                    values = self._block(query_piece[some], asking[some], key_piece, asked, before + some + 1)
                    self._sums[layer] += members[some].double().T @ values

    def _block(self, query: Tensor, asking: Tensor, key: Tensor, asked: Tensor, seen: Tensor) -> Tensor:
        """This rank's part of the figures of n queries, [n, 2 * classes + 4].

        Args:
            query, key: [n, heads, d], [k, groups, d].
            asking, asked: flat indices of their tokens.
            seen: [n], the keys that each query sees are as many of the first.
        """
        scores = torch.einsum("ngrd,kgd->grnk", query.float().unflatten(1, (key.shape[1], -1)), key.float())
        visible = torch.arange(key.shape[0], device=key.device) < seen[:, None]
        attention = (scores * query.shape[-1] ** -0.5).masked_fill_(~visible, -torch.inf).softmax(dim=-1).flatten(0, 1)
        entropy = torch.special.entr(attention).sum(dim=(0, 2)).double() / self._heads

        of_key = self._tokens.key_class[asked].expand(len(seen), -1)
        other_turn = self._tokens.turn[asked] != self._tokens.turn[asking][:, None]
        of_key = torch.where((of_key == KeyClass.ANSWER) & other_turn, int(KeyClass.EARLIER_ANSWER), of_key)
        nothing = torch.zeros(len(seen), len(KeyClass), dtype=torch.float64, device=key.device)
        mass = nothing.scatter_add(1, of_key, attention.double().sum(dim=0) / self._heads)
        # What does not depend on heads is counted by each rank for its share of them.
        here = query.shape[1] / self._heads
        share = nothing.scatter_add(1, of_key, visible.double()) / seen[:, None] * here
        several = seen > 1
        of_log = torch.where(several, entropy / seen.clamp(min=2).log(), 0.0)
        once = torch.full_like(entropy, here)
        return torch.cat([mass, share, torch.stack([entropy, of_log, once, several * here], dim=1)], dim=1)


def of_checkpoint(
    checkpoint: Path,
    overrides: list[str],
    data: str = "validation",
    count: int = 4,
    rows: int = 8,
    vocabulary: Path | None = None,
    tensor: int | None = None,
) -> dict:
    """The "allocation" of a checkpoint over rows of its run's data, with what it was measured on and how.

    Args:
        checkpoint, overrides, vocabulary, tensor: see :func:`~megatron_ext.generation.checkpoint.load`.
        data: ``validation`` or ``train``.
        count, rows: batches, and rows of each over all processes.

    Raises:
        UserError: the checkpoint, an override or the data, named.
    """
    trained = load(checkpoint, overrides, vocabulary, tensor)
    replicas = parallel_state.get_data_parallel_world_size()
    if rows % replicas:
        raise UserError(f"a batch of {rows} rows cannot be shared by {replicas} replicas; take a multiple of them")
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


def _flat_rows(route: Route, layer: LayerRoute) -> tuple[Tensor, Tensor]:
    """Flat indices into the micro-batch of a layer's queries and keys, in attention's order."""
    slices = route.order.split(layer.slices.sizes)
    full, kv_only = (
        join([slices[i] for i in chosen], route.order) for chosen in (layer.slices.full, layer.slices.kv_only)
    )
    queries = full if layer.queries is None else full[layer.queries.index]
    return queries, queries if layer.keys is None else torch.cat([full, kv_only])[layer.keys.index]


def _figures(sums: Tensor, names: dict[str, KeyClass]) -> dict:
    """Figures from the sums [layers, ...] of one set of queries."""

    def ratio(a: float, b: float) -> float | None:
        return a / b if b else None

    layers = []
    for values in sums.tolist():
        mass, share = values[: len(KeyClass)], values[len(KeyClass) : 2 * len(KeyClass)]
        entropy, of_log, queries, several = values[2 * len(KeyClass) :]
        layers.append(
            {
                "queries": round(queries),
                "mass": {name: ratio(mass[c], queries) for name, c in names.items()},
                "over_uniform": {name: ratio(mass[c], share[c]) for name, c in names.items()},
                "entropy": ratio(entropy, queries),
                "entropy_share": ratio(of_log, several),
            }
        )
    return {"queries": max(layer["queries"] for layer in layers), "layers": layers}
