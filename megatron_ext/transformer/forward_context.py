"""The data that all layers share during one forward pass."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_ext.routing.layer_route import LayerRoute
from megatron_ext.routing.route import Route
from megatron_ext.transformer.rotary import RotaryAngles

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer from 0, query [q, 1, heads, d], key and value [k, 1, groups, d]) to [q, 1, heads * d]."""


@dataclass
class ForwardContext:
    """A micro-batch's route with the rotary angles of its queries and keys.

    An unmodified ``TransformerBlock`` passes it to every layer in place of its ``PackedSeqParams``, under activation
    recomputation too.

    Attributes:
        routes: the route of each layer of the whole model, by its number from 0.
        angles: the angles of each layer; layers that share a route share their angles.
        attend: replaces the core attention of all layers; None: each uses its own.
    """

    routes: list[LayerRoute]
    angles: list[RotaryAngles]
    attend: Attend | None = None

    @classmethod
    def of(cls, route: Route, rotary_table: Tensor, attend: Attend | None = None) -> "ForwardContext":
        """The context of a route on a device, with a ``rotary_table`` [2, positions, d / 2] of all its positions."""
        routes = {id(layer): layer for layer in route.layers}
        angles = {
            key: RotaryAngles(rotary_table, layer.query_positions, layer.key_positions) for key, layer in routes.items()
        }
        return cls(route.layers, [angles[id(layer)] for layer in route.layers], attend)
