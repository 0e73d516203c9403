"""Bytes that a rank sends, and in how many messages.

Collectives count as in a ring of t ranks: a gather or a reduce-scatter of n bytes in all sends n (t - 1) / t, an
all-reduce twice that. With e bytes an element, hidden size h, and n rows, FULL unless said otherwise::

    a layer, sequence parallelism   forward     gather, reduce-scatter of attention and of the FFN: 4 e h n (t - 1) / t
                                    backward    the reverse; inputs of unsplit qkv and fc1 again: 6 e h n (t - 1) / t
                                    KV_ONLY     gathered with the others, reverse: 2 e h n (t - 1) / t, by the first
                                                of consecutive layers with the same roles
    a layer, tensor parallelism     forward     two all-reduces: 4 e h n (t - 1) / t
                                    backward    the same, and KV_ONLY rows, once as above: 2 e h n (t - 1) / t
    between stages                  e h T / R   hidden states, or their gradient, once for each border and micro-batch
    replicas, D                     8 N (D - 1) / D, N parameters; sharded: (4 + e) N (D - 1) / D

With full recomputation the messages of a layer's forward pass are sent again.
"""

from dataclasses import dataclass

from megatron_ext.config import ModelConfig
from megatron_ext.routing.flops import low_rank_modules
from megatron_ext.routing.plan import Projections
from megatron_ext.routing.roles import Role


@dataclass(frozen=True)
class Messages:
    """Bytes that a rank sends in some number of messages."""

    bytes: float = 0.0
    number: int = 0

    def __add__(self, other: "Messages") -> "Messages":
        return Messages(self.bytes + other.bytes, self.number + other.number)


def gather(elements: float, size: int, element_size: int, times: int = 1) -> Messages:
    """``times`` gathers, or reduce-scatters, of so many elements in all over ``size`` ranks."""
    if size == 1 or not elements:
        return Messages()
    return Messages(times * element_size * elements * (size - 1) / size, times)


def all_reduce(elements: float, size: int, element_size: int, times: int = 1) -> Messages:
    """``times`` all-reduces of so many elements."""
    one = gather(elements, size, element_size, times)
    return Messages(2 * one.bytes, one.number)


def layer_messages(
    model: ModelConfig,
    projections: Projections,
    full: float,
    kv_only: float,
    tensor: int,
    sequence: bool,
    element_size: int,
    gathered: bool = False,
) -> tuple[Messages, Messages]:
    """What the forward and the backward pass of a layer send, without low-rank deltas.

    Args:
        full, kv_only: rows with these roles on all tensor-parallel ranks together, dummies included.
        gathered: whether an earlier layer has gathered the KV_ONLY rows.
    """
    h = model.hidden_size
    both = (full + (0 if gathered else kv_only)) * h
    if not sequence:
        forward = all_reduce(full * h, tensor, element_size, 2)
        backward = all_reduce(full * h, tensor, element_size) + all_reduce(both, tensor, element_size)
        return forward, backward + (all_reduce(h, tensor, element_size) if kv_only else Messages())
    forward = gather(full * h, tensor, element_size, 3) + gather(both, tensor, element_size)
    split = projections.modules if projections.components else ()
    again = ("qkv" not in split and not kv_only) + ("fc1" not in split)  # inputs that were not kept
    backward = forward + gather(full * h, tensor, element_size, again) if again else forward
    return forward, backward


def low_rank_messages(
    projections: Projections, tokens: list[float], roles: tuple[Role, ...], tensor: int, element_size: int
) -> Messages:
    """What the low-rank deltas of a layer send in the forward pass, and again in the backward pass.

    Args:
        tokens: of each class.
    """
    total = Messages()
    for index, (n, role) in enumerate(zip(tokens, roles)):
        for _ in low_rank_modules(projections, index, role):
            total += gather(n * projections.rank, tensor, element_size)
    return total


def embedding_messages(
    model: ModelConfig, stored: float, tensor: int, sequence: bool, element_size: int
) -> tuple[Messages, Messages]:
    """What the forward and the backward pass of the embedding send, of ``stored`` rows on all ranks together."""
    elements = stored * model.hidden_size
    if sequence:
        return gather(elements, tensor, element_size), gather(elements, tensor, element_size)
    return all_reduce(elements, tensor, element_size), Messages()


def head_messages(
    model: ModelConfig, rows: float, targets: float, tensor: int, sequence: bool, element_size: int
) -> tuple[Messages, Messages]:
    """What the forward and the backward pass of the output head and the loss send.

    Args:
        rows: of the groups that hold targets, on all ranks together.
        targets: tokens with logits.
    """
    loss = all_reduce(targets, tensor, 4, 3)  # largest logit, predicted logit, sum of exponentials
    if sequence:
        return loss + gather(rows * model.hidden_size, tensor, element_size), gather(
            rows * model.hidden_size, tensor, element_size
        )
    return loss, all_reduce(targets * model.hidden_size, tensor, element_size)


def border_message(model: ModelConfig, stored: int, ranks: int, element_size: int) -> Messages:
    """What a rank sends to the next stage, or back, for a micro-batch of ``stored`` rows on all ``ranks`` that share
    them."""
    return Messages(element_size * model.hidden_size * stored / ranks, 1)


def replica_messages(parameters: float, replicas: int, sharded: bool, element_size: int) -> tuple[Messages, Messages]:
    """What the reduction of gradients sends in a step, and the gathering of new weights."""
    if not sharded:
        return all_reduce(parameters, replicas, 4), Messages()
    return gather(parameters, replicas, 4), gather(parameters, replicas, element_size)
