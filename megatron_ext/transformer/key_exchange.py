"""Keys and values that context ranks send one another (:mod:`~megatron_ext.routing.context`).

They travel before rotation: the receiver rotates them by their positions, like its own. A rank sends every key to those
ranks whose queries see it, and to no other, in one message per pair of ranks; the backward pass sends the gradients
back, and the key's owner adds them in the order of ranks.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.routing.context import Exchange
from megatron_ext.routing.permutation import Permutation
from megatron_ext.transformer.autograd_function import Function
from megatron_ext.transformer.kernels.backend import backend_of
from megatron_ext.transformer.rotary import RotaryAngles


def query_key_value_of_ranks(
    mixed: Tensor,
    kv_only: Tensor | None,
    queries: Permutation | None,
    keys: Permutation,
    rotary: RotaryAngles,
    exchange: Exchange,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`~megatron_ext.transformer.kernels.functions.query_key_value`, where ``keys`` also come from rows that
    other context ranks send. Collective over the context-parallel group, forward and backward."""
    return _QueryKeyValueOfRanks.call(mixed, kv_only, queries, keys, rotary, exchange)


class _QueryKeyValueOfRanks(Function):
    """Saves no tensor: received keys live as long as the keys in attention's order that are made of them."""

    @staticmethod
    def forward(ctx, mixed: Tensor, kv_only: Tensor | None, queries, keys, rotary: RotaryAngles, exchange) -> tuple:
        ctx.permutations, ctx.rotary, ctx.exchange = (queries, keys), rotary, exchange
        ctx.row_counts = mixed.shape[0], None if kv_only is None else kv_only.shape[0]
        others = _send(mixed[..., -2:, :], kv_only, exchange)
        if kv_only is not None:
            others = torch.cat([kv_only, others])
        return backend_of(mixed).query_key_value_forward(mixed, others, queries, keys, rotary)

    @staticmethod
    def backward(ctx, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple:
        exchange, (full_rows, kv_rows) = ctx.exchange, ctx.row_counts
        grads = (grad.contiguous() for grad in (grad_query, grad_key, grad_value))
        rows = (kv_rows or 0) + sum(exchange.received)
        grad_mixed, grad_others = backend_of(grad_query).query_key_value_backward(
            *grads, *ctx.permutations, ctx.rotary, full_rows, rows
        )
        grad_kv_only = None if kv_rows is None else grad_others[:kv_rows]
        _add_returned(grad_mixed[..., -2:, :], grad_kv_only, grad_others[kv_rows or 0 :], exchange)
        return grad_mixed, grad_kv_only, None, None, None, None


def _send(full: Tensor, kv_only: Tensor | None, exchange: Exchange) -> Tensor:
    """The received pairs [n, 1, groups, 2, d], from the pairs of this rank's FULL and KV_ONLY rows."""
    outgoing = full.index_select(0, exchange.full)
    if kv_only is not None:
        of_ranks = outgoing.split(exchange.sent_full), kv_only.index_select(0, exchange.kv_only).split(_kv(exchange))
        outgoing = torch.cat([part for parts in zip(*of_ranks) for part in parts])
    return _all_to_all(outgoing, exchange.sent, exchange.received)


def _add_returned(full: Tensor, kv_only: Tensor | None, received: Tensor, exchange: Exchange) -> None:
    """Send the gradients of ``received`` pairs back and add those that return to the gradients of this rank's rows."""
    returned = _all_to_all(received.contiguous(), exchange.received, exchange.sent)
    full_rows, kv_rows = exchange.full.split(exchange.sent_full), exchange.kv_only.split(_kv(exchange))
    for gradients, of_full, of_kv in zip(returned.split(exchange.sent), full_rows, kv_rows):
        if len(of_full):
            full.index_add_(0, of_full, gradients[: len(of_full)])
        if len(of_kv):
            kv_only.index_add_(0, of_kv, gradients[len(of_full) :])


def _kv(exchange: Exchange) -> list[int]:
    return [rows - full for rows, full in zip(exchange.sent, exchange.sent_full)]


def _all_to_all(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    output = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(output, rows, received, sent, group=parallel_state.get_context_parallel_group())
    return output
