"""A Transformer layer in which tokens have roles."""

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ext.routing.route import Route
from megatron_ext.transformer.rows import join


class UnifiedLayer(TransformerLayer):
    """Megatron-Core's layer, computed for the tokens that take part in it.

    FULL tokens go through everything; of KV_ONLY tokens there is a norm, a key and a value; SKIP tokens are passed on.
    What a token has no part in is not computed.
    """

    def forward(self, hidden_states: Tensor, packed_seq_params: Route, **unused) -> tuple[Tensor, None]:
        """Hidden states [T / R, 1, h] in the route's stored order to the same; those of tokens that are not FULL leave
        with the bits with which they came."""
        route = packed_seq_params.layers[self.layer_number - 1]
        of = route.pieces
        pieces = list(hidden_states.split(of.sizes)) if of.sizes else []
        full = join([pieces[i] for i in of.full], hidden_states)
        kv_only = self.input_layernorm(join([pieces[i] for i in of.kv_only], full)) if of.kv_only else None

        full = full + self.self_attention(self.input_layernorm(full), kv_only, route)
        gate_up = self.mlp.linear_fc1(self.pre_mlp_layernorm(full), of.full_splits)
        full = full + self.mlp.linear_fc2(self.mlp.activation_func(gate_up), of.full_splits)

        for i, piece in zip(of.full, full.split([of.sizes[i] for i in of.full]) if of.full else ()):
            pieces[i] = piece
        # Where nobody is FULL the empty result still goes along, so that every weight has a gradient of zero.
        return (full if len(pieces) == len(of.full) == 1 else join([*pieces, full[:0]], full)), None
