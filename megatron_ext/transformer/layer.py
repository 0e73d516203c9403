"""A Transformer layer in which tokens have roles."""

from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ext.routing.route import Route
from megatron_ext.transformer.rows import join


@dataclass
class InPieces:
    """Hidden states in pieces of ``sizes`` rows, as layers with the same pieces hand them on: so what none of them
    changes is never copied, nor normed again.

    Attributes:
        kv_only: which pieces were KV_ONLY in the layer before.
        normed_kv_only: their rows, normed without a weight; None: there are none.
    """

    sizes: list[int]
    pieces: list[Tensor]
    kv_only: list[int] = field(default_factory=list)
    normed_kv_only: Tensor | None = None

    def normed(self, sizes: list[int], kv_only: list[int]) -> Tensor | None:
        """The normed rows of the pieces ``kv_only``, if they are known."""
        return self.normed_kv_only if (self.sizes, self.kv_only) == (sizes, kv_only) else None


class UnifiedLayer(TransformerLayer):
    """Megatron-Core's layer, computed for the tokens that take part in it.

    FULL tokens go through everything; of KV_ONLY tokens there is a norm, a key and a value; SKIP tokens are passed on.
    What a token has no part in is not computed.

    Attributes:
        joins: whether hidden states leave as one tensor: from the last layer of a stage, and where layers are
            recomputed, as only tensors can be kept for that.
    """

    joins = True

    def forward(
        self, hidden_states: Tensor | InPieces, packed_seq_params: Route, **unused
    ) -> tuple[Tensor | InPieces, None]:
        """Hidden states [T / R, 1, h] in the route's stored order to the same; those of tokens that are not FULL leave
        with the bits with which they came."""
        route = packed_seq_params.layers[self.layer_number - 1]
        of = route.pieces
        pieces = _cut(hidden_states, of.sizes)
        if not (of.full or of.kv_only or torch.is_grad_enabled()):
            return join(pieces, pieces[0]) if self.joins else InPieces(of.sizes, pieces), None
        full = join([pieces[i] for i in of.full], pieces[0])
        normed_kv_only = None
        if isinstance(hidden_states, InPieces):
            normed_kv_only = hidden_states.normed(of.sizes, of.kv_only)
        if of.kv_only and normed_kv_only is None:
            kv_only = join([pieces[i] for i in of.kv_only], full)
            full, kv_only, normed, normed_kv_only = self.input_layernorm(full, kv_only)
            _put(pieces, of.sizes, of.kv_only, kv_only)
        else:
            full, _, normed, _ = self.input_layernorm(full, None)
        attended = self.self_attention(normed, normed_kv_only, self.input_layernorm.weight, route)
        full, normed = self.pre_mlp_layernorm(full, attended)
        gate_up = self.mlp.linear_fc1(normed, of.full_splits)
        full = full + self.mlp.linear_fc2(self.mlp.activation_func(gate_up), of.full_splits)

        _put(pieces, of.sizes, of.full, full)
        if of.full and not self.joins:
            return InPieces(of.sizes, pieces, of.kv_only, normed_kv_only), None
        # Where nobody is FULL the empty result still goes along, so that every weight has a gradient of zero.
        return join(pieces if of.full else [*pieces, full], full), None


def _put(pieces: list[Tensor], sizes: list[int], chosen: list[int], rows: Tensor | None) -> None:
    """``rows`` in place of the ``chosen`` pieces."""
    if chosen:
        for i, piece in zip(chosen, rows.split([sizes[i] for i in chosen]) if len(chosen) > 1 else [rows]):
            pieces[i] = piece


def _cut(hidden_states: Tensor | InPieces, sizes: list[int]) -> list[Tensor]:
    if isinstance(hidden_states, InPieces):
        if hidden_states.sizes == sizes:
            return list(hidden_states.pieces)
        hidden_states = join(hidden_states.pieces, hidden_states.pieces[0])
    return list(hidden_states.split(sizes)) if sizes else [hidden_states]
