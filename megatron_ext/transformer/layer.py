"""A Transformer layer of tokens with roles."""

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ext.transformer.forward_context import ForwardContext
from megatron_ext.transformer.hidden_states import SlicedHiddenStates, cut, join, kv_only_input, replace_slices


class UnifiedLayer(TransformerLayer):
    """Megatron-Core's layer, computed only for the tokens that take part in it.

    FULL tokens pass through attention and the FFN. KV_ONLY tokens are normed and projected to a key and a value. SKIP
    tokens cost nothing. Tokens that are not FULL pass through bit for bit.
    """

    def __init__(self, *arguments, passes_slices: bool = False, **options):
        """
        Args:
            passes_slices: whether hidden states leave as :class:`SlicedHiddenStates`, for another layer of this kind;
                else as one tensor, as the last layer of a stage must, and all layers that are recomputed.
        """
        super().__init__(*arguments, **options)
        self._passes_slices = passes_slices

    def forward(
        self, hidden_states: Tensor | SlicedHiddenStates, packed_seq_params: ForwardContext, **unused
    ) -> tuple[Tensor | SlicedHiddenStates, None]:
        """Hidden states [T / R, 1, h] before the layer, in the route's stored order, to those after it."""
        layout = packed_seq_params.routes[self.layer_number - 1].slices
        slices = cut(hidden_states, layout.sizes)
        if not (layout.full or layout.kv_only or torch.is_grad_enabled()):
            return SlicedHiddenStates(layout.sizes, slices) if self._passes_slices else join(slices, slices[0]), None
        full = join([slices[i] for i in layout.full], slices[0])
        carried = kv_only_input(hidden_states, layout.sizes, layout.kv_only)
        if layout.kv_only and carried is None:
            kv_only = join([slices[i] for i in layout.kv_only], full)
            full, kv_only, normed, normed_kv_only = self.input_layernorm(full, kv_only)
            replace_slices(slices, layout.sizes, layout.kv_only, kv_only)
        else:
            full, _, normed, normed_kv_only = self.input_layernorm(full, None)
        attended, carried = self.self_attention(
            normed, normed_kv_only, self.input_layernorm.weight, packed_seq_params, carried
        )
        full, normed = self.pre_mlp_layernorm(full, attended)
        gate_up = self.mlp.linear_fc1(normed, layout.full_splits)
        full = full + self.mlp.linear_fc2(self.mlp.activation_func(gate_up), layout.full_splits)

        replace_slices(slices, layout.sizes, layout.full, full)
        if layout.full and self._passes_slices:
            return SlicedHiddenStates(layout.sizes, slices, layout.kv_only, carried), None
        # Without FULL tokens the empty result is joined too, so that every weight has a gradient of zero.
        return join(slices if layout.full else [*slices, full], full), None
