"""The unified model: Megatron-Core's GPTModel over packed rows of text and image tokens."""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_ext.config import Config
from megatron_ext.data.batch import Batch
from megatron_ext.routing.route import Route
from megatron_ext.transformer.initialization import initialize
from megatron_ext.transformer.rotary import rotary_table
from megatron_ext.transformer.specs import block_spec, transformer_config


class UnifiedModel(GPTModel):
    """One pipeline stage (or virtual stage) of the model.

    The rows of a micro-batch are laid end to end, so the stack sees hidden states of shape [t, 1, h] with
    t = micro_batch_size * sequence_length (t / tensor-parallel size of them under sequence parallelism), and
    attention is told by the :class:`~megatron_ext.routing.route.Route` where documents begin and end.
    """

    def __init__(self, config: Config, vocab_size: int, vp_stage: int | None = None):
        """
        Args:
            config: the run's configuration.
            vocab_size: rows of the embedding table, padded to a multiple of the tensor-parallel size.
            vp_stage: which model chunk of this pipeline stage, with an interleaved schedule.
        """
        transformer = transformer_config(config)
        edges = {"ignore_virtual": False, "vp_stage": vp_stage}
        super().__init__(
            config=transformer,
            transformer_layer_spec=block_spec(config, transformer, vp_stage),
            vocab_size=vocab_size,
            max_sequence_length=config.data.sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(**edges),
            post_process=parallel_state.is_pipeline_last_stage(**edges),
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.model.rotary_base,
            rope_scaling=config.model.rotary_scaling_factor is not None,
            rope_scaling_factor=config.model.rotary_scaling_factor or 1.0,
            vp_stage=vp_stage,
        )

    def forward(self, batch: Batch, route: Route) -> Tensor:
        """Run this stage on one micro-batch.

        Returns:
            On the last stage the logits [t, 1, vocabulary / tensor-parallel size], else hidden states [t, 1, h].
        """
        hidden_states = None
        if self.pre_process:
            tokens = batch.tokens.reshape(1, -1)
            hidden_states = self.embedding(input_ids=tokens, position_ids=None)
        hidden_states = self.decoder(
            hidden_states=hidden_states,
            attention_mask=None,
            rotary_pos_emb=rotary_table(self.rotary_pos_emb.inv_freq, batch.positions.flatten()),
            packed_seq_params=route,
        )
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, weight=weight)[0]

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each token, [b, s], float32, from the logits of :meth:`forward` and labels [b, s]."""
        return self.compute_language_model_loss(labels.reshape(1, -1), logits).view(labels.shape)


def build_chunks(config: Config, vocab_size: int) -> list[UnifiedModel]:
    """This rank's model chunks, on its device, with initial weights that do not depend on the layout."""
    stages = range(config.parallel.virtual_pipeline) if config.parallel.virtual_pipeline > 1 else [None]
    chunks = [UnifiedModel(config, vocab_size, vp_stage=stage).cuda(torch.cuda.current_device()) for stage in stages]
    initialize(chunks, config.model, config.training.seed)
    return chunks
